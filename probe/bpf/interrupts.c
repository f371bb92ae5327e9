/* Interrupts, soft interrupts, timers, work queues, the idle state, and the end of a quota period. */

/* @fields
 * irqaction.name hrtimer.function hrtimer.node.expires hrtimer._softexpires timer_list.function timer_list.expires
 * work_struct.func task_group.cfs_bandwidth.period_timer task_group.css task_group.cfs_bandwidth.slack_timer
 */

int raw_irq_handler_entry(u64 *ctx) {
  u64 name[2] = {0, 0};
  ARGS;
  bpf_probe_read_kernel_str(name, sizeof name, (void *)READ(u64, ARG(irq_handler_entry, action), OFF_irqaction_name));
  SET(IRQ_HANDLER_ENTRY, IRQ, ARG(irq_handler_entry, irq));
  SET(IRQ_HANDLER_ENTRY, NAME_LO, name[0]);
  SET(IRQ_HANDLER_ENTRY, NAME_HI, name[1]);
  return EMIT(IRQ_HANDLER_ENTRY);
}

int raw_irq_handler_exit(u64 *ctx) {
  ARGS;
  SET(IRQ_HANDLER_EXIT, IRQ, ARG(irq_handler_exit, irq));
  SET(IRQ_HANDLER_EXIT, RET, ARG(irq_handler_exit, ret));
  return EMIT(IRQ_HANDLER_EXIT);
}

#define ONE_NUMBER(name, KIND, FIELD) \
  int raw_##name(u64 *ctx) {          \
    ARGS;                             \
    SET(KIND, FIELD, ctx[0]);         \
    return EMIT(KIND);                \
  }

ONE_NUMBER(softirq_entry, SOFTIRQ_ENTRY, VEC)
ONE_NUMBER(softirq_exit, SOFTIRQ_EXIT, VEC)
ONE_NUMBER(softirq_raise, SOFTIRQ_RAISE, VEC)
ONE_NUMBER(local_timer_entry, LOCAL_TIMER_ENTRY, VECTOR)
ONE_NUMBER(local_timer_exit, LOCAL_TIMER_EXIT, VECTOR)
ONE_NUMBER(reschedule_entry, RESCHEDULE_ENTRY, VECTOR)
ONE_NUMBER(reschedule_exit, RESCHEDULE_EXIT, VECTOR)
ONE_NUMBER(call_function_entry, CALL_FUNCTION_ENTRY, VECTOR)
ONE_NUMBER(call_function_exit, CALL_FUNCTION_EXIT, VECTOR)
ONE_NUMBER(call_function_single_entry, CALL_FUNCTION_SINGLE_ENTRY, VECTOR)
ONE_NUMBER(call_function_single_exit, CALL_FUNCTION_SINGLE_EXIT, VECTOR)
ONE_NUMBER(irq_work_entry, IRQ_WORK_ENTRY, VECTOR)
ONE_NUMBER(irq_work_exit, IRQ_WORK_EXIT, VECTOR)
ONE_NUMBER(cpu_idle, CPU_IDLE, STATE)

#define TASKLET(name, KIND)        \
  int raw_##name(u64 *ctx) {       \
    ARGS;                          \
    SET(KIND, TASKLET, ctx[0]);    \
    SET(KIND, FUNC, ctx[1]);       \
    return EMIT(KIND);             \
  }

#ifdef ARG_tasklet_entry__func
TASKLET(tasklet_entry, TASKLET_ENTRY)
TASKLET(tasklet_exit, TASKLET_EXIT)
#endif

#ifdef ARG_ipi_send_cpu__callback
int raw_ipi_send_cpu(u64 *ctx) {
  ARGS;
  SET(IPI_SEND_CPU, TARGET_CPU, ARG(ipi_send_cpu, cpu));
  SET(IPI_SEND_CPU, CALLSITE, ARG(ipi_send_cpu, callsite));
  SET(IPI_SEND_CPU, CALLBACK, ARG(ipi_send_cpu, callback));
  return EMIT(IPI_SEND_CPU);
}
#endif

#ifdef ARG_ipi_send_cpumask__callback
int raw_ipi_send_cpumask(u64 *ctx) {
  ARGS;
  SET(IPI_SEND_CPUMASK, CPUMASK_LO, READ(u64, ARG(ipi_send_cpumask, cpumask), 0));
  SET(IPI_SEND_CPUMASK, CALLSITE, ARG(ipi_send_cpumask, callsite));
  SET(IPI_SEND_CPUMASK, CALLBACK, ARG(ipi_send_cpumask, callback));
  return EMIT(IPI_SEND_CPUMASK);
}
#endif

int raw_nmi_handler(u64 *ctx) {
  ARGS;
  SET(NMI_HANDLER, HANDLER, ctx[0]);
  SET(NMI_HANDLER, DELTA_NS, ctx[1]);
  SET(NMI_HANDLER, HANDLED, ctx[2]);
  return EMIT(NMI_HANDLER);
}

/* --- timers: whoever arms one is told only for watched processes; every expiry is told */
#ifdef ARG_hrtimer_start__hrtimer
int raw_hrtimer_start(u64 *ctx) {
  u64 timer = ARG(hrtimer_start, hrtimer);
  ARGS;
  if (!(current_flags() & WATCHED))
    return 0;
  SET(HRTIMER_START, HRTIMER, timer);
  SET(HRTIMER_START, FUNCTION, READ(u64, timer, OFF_hrtimer_function));
  SET(HRTIMER_START, EXPIRES_NS, READ(u64, timer, OFF_hrtimer_node_expires));
  SET(HRTIMER_START, SOFTEXPIRES_NS, READ(u64, timer, OFF_hrtimer__softexpires));
  SET(HRTIMER_START, MODE, ARG(hrtimer_start, mode));
  return EMIT(HRTIMER_START);
}
#endif

int raw_hrtimer_cancel(u64 *ctx) {
  ARGS;
  if (!(current_flags() & WATCHED))
    return 0;
  SET(HRTIMER_CANCEL, HRTIMER, ctx[0]);
  return EMIT(HRTIMER_CANCEL);
}

int raw_hrtimer_expire_entry(u64 *ctx) {
  u64 timer = ctx[0];
  ARGS;
  SET(HRTIMER_EXPIRE_ENTRY, HRTIMER, timer);
  SET(HRTIMER_EXPIRE_ENTRY, FUNCTION, READ(u64, timer, OFF_hrtimer_function));
  SET(HRTIMER_EXPIRE_ENTRY, NOW_NS, READ(u64, ctx[1], 0));
  return EMIT(HRTIMER_EXPIRE_ENTRY);
}

ONE_NUMBER(hrtimer_expire_exit, HRTIMER_EXPIRE_EXIT, HRTIMER)

int raw_timer_start(u64 *ctx) {
  ARGS;
  if (!(current_flags() & WATCHED))
    return 0;
  SET(TIMER_START, TIMER, ctx[0]);
  SET(TIMER_START, FUNCTION, READ(u64, ctx[0], OFF_timer_list_function));
  SET(TIMER_START, EXPIRES_JIFFIES, READ(u64, ctx[0], OFF_timer_list_expires));
  return EMIT(TIMER_START);
}

int raw_timer_expire_entry(u64 *ctx) {
  ARGS;
  SET(TIMER_EXPIRE_ENTRY, TIMER, ctx[0]);
  SET(TIMER_EXPIRE_ENTRY, FUNCTION, READ(u64, ctx[0], OFF_timer_list_function));
  SET(TIMER_EXPIRE_ENTRY, NOW_JIFFIES, jiffies64());
  return EMIT(TIMER_EXPIRE_ENTRY);
}

ONE_NUMBER(timer_expire_exit, TIMER_EXPIRE_EXIT, TIMER)

/* A quota period ends, and its cgroup may run again, when its timer's function returns: the exit event has the timer only,
 * whose function pointer still says what it was. */
#ifdef OFF_task_group_cfs_bandwidth_period_timer
int raw_cfs_period_timer(u64 *ctx) {
  u64 timer = ctx[0], function = READ(u64, timer, OFF_hrtimer_function), group;
  struct config *config = VALUE_OF(struct config, MAP_CONFIG);
  u64 slack = function == config->slack_timer;
  ARGS;
  if (!function || (!slack && function != config->period_timer))
    return 0;
  group = slack ? timer - OFF_task_group_cfs_bandwidth_slack_timer : timer - OFF_task_group_cfs_bandwidth_period_timer;
  SET(CFS_PERIOD_TIMER, HRTIMER, timer);
  SET(CFS_PERIOD_TIMER, SLACK, slack);
  SET(CFS_PERIOD_TIMER, CGROUP_ID, cgroup_id_of_css(group + OFF_task_group_css));
  return EMIT(CFS_PERIOD_TIMER);
}
#endif

/* --- work queues */
int raw_workqueue_queue_work(u64 *ctx) {
  u64 work = ARG(workqueue_queue_work, work);
  ARGS;
  SET(WORKQUEUE_QUEUE_WORK, WORK, work);
  SET(WORKQUEUE_QUEUE_WORK, FUNCTION, READ(u64, work, OFF_work_struct_func));
  SET(WORKQUEUE_QUEUE_WORK, REQ_CPU, ARG(workqueue_queue_work, req_cpu));
  return EMIT(WORKQUEUE_QUEUE_WORK);
}

#define WORK_EVENT(name, KIND)                                      \
  int raw_##name(u64 *ctx) {                                        \
    ARGS;                                                           \
    SET(KIND, WORK, ctx[0]);                                        \
    SET(KIND, FUNCTION, READ(u64, ctx[0], OFF_work_struct_func));   \
    return EMIT(KIND);                                              \
  }

WORK_EVENT(workqueue_activate_work, WORKQUEUE_ACTIVATE_WORK)
WORK_EVENT(workqueue_execute_start, WORKQUEUE_EXECUTE_START)

/* the work may be gone by now: its function comes as an argument (since 5.6) */
int raw_workqueue_execute_end(u64 *ctx) {
  ARGS;
  SET(WORKQUEUE_EXECUTE_END, WORK, ctx[0]);
#ifdef ARG_workqueue_execute_end__function
  SET(WORKQUEUE_EXECUTE_END, FUNCTION, ARG(workqueue_execute_end, function));
#endif
  return EMIT(WORKQUEUE_EXECUTE_END);
}
