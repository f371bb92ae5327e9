/* Sockets, TCP, packets, signals. Addresses and ports are in host order: 127.0.0.1 is 0x7f000001; of an IPv6 address the last
 * four bytes. */

/* @fields
 * sock.__sk_common.skc_daddr sock.__sk_common.skc_rcv_saddr sock.__sk_common.skc_dport sock.__sk_common.skc_num
 * sock.__sk_common.skc_family sock.__sk_common.skc_state sock.__sk_common.skc_v6_daddr sock.__sk_common.skc_v6_rcv_saddr
 * sock.__sk_common.skc_net.net net.ns.inum sock.sk_protocol sk_buff.cb tcp_skb_cb.seq tcp_skb_cb.end_seq tcp_skb_cb.ack_seq
 * sk_buff.head sk_buff.data sk_buff.network_header sk_buff.protocol sk_buff.dev net_device.ifindex net_device.nd_net.net
 * napi_struct.dev kernel_siginfo.si_code k_sigaction.sa.sa_handler k_sigaction.sa.sa_flags
 */

#define FAMILY_IPV6 10
#define LAST_WORD 12 /* of an IPv6 address */

static __always_inline u32 swap32(u32 v) { return __builtin_bswap32(v); }
static __always_inline u16 swap16(u16 v) { return __builtin_bswap16(v); }

static __always_inline u32 netns_of(u64 net) { return net ? READ(u32, net, OFF_net_ns_inum) : 0; }

static __always_inline u32 netns_of_sock(u64 sk) {
  return netns_of(READ(u64, sk, OFF_sock___sk_common_skc_net_net));
}

/* The fields that name a socket; every kind that has them has them in one place. */
static __always_inline void set_sock(u64 *args, u64 sk) {
  u16 family = READ(u16, sk, OFF_sock___sk_common_skc_family);
  SET(TCP_PROBE, SK, sk);
  if (!sk)
    return;
  if (family == FAMILY_IPV6) {
    SET(TCP_PROBE, SADDR, swap32(READ(u32, sk, OFF_sock___sk_common_skc_v6_rcv_saddr + LAST_WORD)));
    SET(TCP_PROBE, DADDR, swap32(READ(u32, sk, OFF_sock___sk_common_skc_v6_daddr + LAST_WORD)));
  } else {
    SET(TCP_PROBE, SADDR, swap32(READ(u32, sk, OFF_sock___sk_common_skc_rcv_saddr)));
    SET(TCP_PROBE, DADDR, swap32(READ(u32, sk, OFF_sock___sk_common_skc_daddr)));
  }
  SET(TCP_PROBE, SPORT, READ(u16, sk, OFF_sock___sk_common_skc_num));
  SET(TCP_PROBE, DPORT, swap16(READ(u16, sk, OFF_sock___sk_common_skc_dport)));
  SET(TCP_PROBE, FAMILY, family);
}

#define STATE_LISTEN 10
#define STATE_SYN_SENT 2

/* A socket that begins to listen on, or to connect to, a watched port: its process joins the watch set. */
static __always_inline void watch_by_port(u16 port) {
  struct config *config = VALUE_OF(struct config, MAP_CONFIG);
  u32 tgid = bpf_get_current_pid_tgid() >> 32;
  u64 n = config->ports;
#pragma unroll
  for (u32 i = 0; i < PORTS_MAX; i++)
    if (i < n && config->port[i] == port)
      watch_process(tgid);
}

int raw_inet_sock_set_state(u64 *ctx) {
  u64 sk = ARG(inet_sock_set_state, sk);
  u32 state = ARG(inet_sock_set_state, newstate);
  ARGS;
  set_sock(args, sk);
  if (state == STATE_LISTEN)
    watch_by_port(READ(u16, sk, OFF_sock___sk_common_skc_num));
  if (state == STATE_SYN_SENT)
    watch_by_port(swap16(READ(u16, sk, OFF_sock___sk_common_skc_dport)));
  SET(INET_SOCK_SET_STATE, OLDSTATE, ARG(inet_sock_set_state, oldstate));
  SET(INET_SOCK_SET_STATE, NEWSTATE, state);
  SET(INET_SOCK_SET_STATE, PROTOCOL, READ(u16, sk, OFF_sock_sk_protocol));
  SET(INET_SOCK_SET_STATE, NETNS_INO, netns_of_sock(sk));
  return EMIT(INET_SOCK_SET_STATE);
}

int raw_tcp_retransmit_skb(u64 *ctx) {
  u64 sk = ARG(tcp_retransmit_skb, sk), control = ARG(tcp_retransmit_skb, skb) + OFF_sk_buff_cb;
  ARGS;
  set_sock(args, sk);
  SET(TCP_RETRANSMIT_SKB, STATE, READ(u8, sk, OFF_sock___sk_common_skc_state));
  SET(TCP_RETRANSMIT_SKB, SEQ, READ(u32, control, OFF_tcp_skb_cb_seq));
  SET(TCP_RETRANSMIT_SKB, END_SEQ, READ(u32, control, OFF_tcp_skb_cb_end_seq));
  SET(TCP_RETRANSMIT_SKB, NETNS_INO, netns_of_sock(sk));
  return EMIT(TCP_RETRANSMIT_SKB);
}

int raw_tcp_receive_reset(u64 *ctx) {
  u64 sk = ARG(tcp_receive_reset, sk);
  ARGS;
  set_sock(args, sk);
  SET(TCP_RECEIVE_RESET, NETNS_INO, netns_of_sock(sk));
  return EMIT(TCP_RECEIVE_RESET);
}

int raw_tcp_probe(u64 *ctx) {
  u64 sk = ARG(tcp_probe, sk), control = ARG(tcp_probe, skb) + OFF_sk_buff_cb;
  ARGS;
  set_sock(args, sk);
  SET(TCP_PROBE, SEQ, READ(u32, control, OFF_tcp_skb_cb_seq));
  SET(TCP_PROBE, END_SEQ, READ(u32, control, OFF_tcp_skb_cb_end_seq));
  SET(TCP_PROBE, ACK_SEQ, READ(u32, control, OFF_tcp_skb_cb_ack_seq));
  SET(TCP_PROBE, NETNS_INO, netns_of_sock(sk));
  return EMIT(TCP_PROBE);
}

int raw_tcp_destroy_sock(u64 *ctx) {
  u64 sk = ARG(tcp_destroy_sock, sk);
  ARGS;
  set_sock(args, sk);
  SET(TCP_DESTROY_SOCK, NETNS_INO, netns_of_sock(sk));
  return EMIT(TCP_DESTROY_SOCK);
}

#ifdef ARG_sk_data_ready__sk
int raw_sk_data_ready(u64 *ctx) {
  u64 sk = ARG(sk_data_ready, sk);
  ARGS;
  set_sock(args, sk);
  SET(SK_DATA_READY, PROTOCOL, READ(u16, sk, OFF_sock_sk_protocol));
  SET(SK_DATA_READY, NETNS_INO, netns_of_sock(sk));
  return EMIT(SK_DATA_READY);
}
#endif

/* --- packets */
#define IPV4 0x0800
#define IPV6 0x86dd
#define TCP 6
#define UDP 17

struct ports_and_numbers { /* the first 16 bytes of a TCP header; of UDP the ports only */
  u16 source, destination;
  u32 sequence, acknowledged;
  u8 offset, flags;
  u16 window;
};

struct headers {
  u32 saddr, daddr, seq, ack_seq, ip_len;
  u16 sport, dport, family;
  u8 tcp_flags, protocol;
};

/* IP and TCP header at `at`; all zero for anything else, extension headers and fragments included in what is not followed. */
static __always_inline void parse(u64 at, u16 ethertype, struct headers *out) {
  struct ports_and_numbers tcp = {};
  if (ethertype == IPV4) {
    u8 ip[20] = {};
    if (bpf_probe_read_kernel(ip, sizeof ip, (void *)at) || ip[0] >> 4 != 4)
      return;
    out->family = 2;
    out->ip_len = swap16(*(u16 *)(ip + 2));
    out->protocol = ip[9];
    out->saddr = swap32(*(u32 *)(ip + 12));
    out->daddr = swap32(*(u32 *)(ip + 16));
    if ((swap16(*(u16 *)(ip + 6)) & 0x1fff) != 0) /* a later fragment has no ports */
      return;
    at += (ip[0] & 15) * 4;
  } else if (ethertype == IPV6) {
    u8 ip[40] = {};
    if (bpf_probe_read_kernel(ip, sizeof ip, (void *)at) || ip[0] >> 4 != 6)
      return;
    out->family = FAMILY_IPV6;
    out->ip_len = swap16(*(u16 *)(ip + 4)) + 40;
    out->protocol = ip[6];
    out->saddr = swap32(*(u32 *)(ip + 8 + LAST_WORD));
    out->daddr = swap32(*(u32 *)(ip + 24 + LAST_WORD));
    at += 40;
  } else {
    return;
  }
  if (out->protocol != TCP && out->protocol != UDP)
    return;
  bpf_probe_read_kernel(&tcp, sizeof tcp, (void *)at);
  out->sport = swap16(tcp.source);
  out->dport = swap16(tcp.destination);
  if (out->protocol == TCP) {
    out->seq = swap32(tcp.sequence);
    out->ack_seq = swap32(tcp.acknowledged);
    out->tcp_flags = tcp.flags;
  }
}

static __always_inline u64 network_header(u64 skb) {
  return READ(u64, skb, OFF_sk_buff_head) + READ(u16, skb, OFF_sk_buff_network_header);
}

static __always_inline int packet_event(u32 kind, u64 skb, u64 at) {
  struct headers h = {};
  u64 device = READ(u64, skb, OFF_sk_buff_dev);
  ARGS;
  parse(at, swap16(READ(u16, skb, OFF_sk_buff_protocol)), &h);
  SET(NET_DEV_QUEUE, SKB, skb);
  SET(NET_DEV_QUEUE, SADDR, h.saddr);
  SET(NET_DEV_QUEUE, DADDR, h.daddr);
  SET(NET_DEV_QUEUE, SPORT, h.sport);
  SET(NET_DEV_QUEUE, DPORT, h.dport);
  SET(NET_DEV_QUEUE, IP_LEN, h.ip_len);
  SET(NET_DEV_QUEUE, TCP_FLAGS, h.tcp_flags);
  SET(NET_DEV_QUEUE, PROTOCOL, h.protocol);
  SET(NET_DEV_QUEUE, SEQ, h.seq);
  SET(NET_DEV_QUEUE, ACK_SEQ, h.ack_seq);
  if (device) {
    SET(NET_DEV_QUEUE, IFINDEX, READ(u32, device, OFF_net_device_ifindex));
    SET(NET_DEV_QUEUE, NETNS_INO, netns_of(READ(u64, device, OFF_net_device_nd_net_net)));
  }
  return emit(kind, bpf_get_current_pid_tgid(), args);
}

int raw_net_dev_queue(u64 *ctx) {
  u64 skb = ARG(net_dev_queue, skb);
  return packet_event(KIND_NET_DEV_QUEUE, skb, network_header(skb));
}

int raw_net_dev_start_xmit(u64 *ctx) {
  u64 skb = ARG(net_dev_start_xmit, skb);
  return packet_event(KIND_NET_DEV_START_XMIT, skb, network_header(skb));
}

/* its data begins with the network header; the header's own place is set just after this event */
int raw_netif_receive_skb(u64 *ctx) {
  u64 skb = ARG(netif_receive_skb, skb);
  return packet_event(KIND_NETIF_RECEIVE_SKB, skb, READ(u64, skb, OFF_sk_buff_data));
}

int raw_net_dev_xmit(u64 *ctx) {
  ARGS;
  SET(NET_DEV_XMIT, SKB, ARG(net_dev_xmit, skb));
  SET(NET_DEV_XMIT, RC, ARG(net_dev_xmit, rc));
  SET(NET_DEV_XMIT, LEN, ARG(net_dev_xmit, skb_len));
  SET(NET_DEV_XMIT, IFINDEX, READ(u32, ARG(net_dev_xmit, dev), OFF_net_device_ifindex));
  return EMIT(NET_DEV_XMIT);
}

int raw_napi_poll(u64 *ctx) {
  u64 napi = ARG(napi_poll, napi), device = READ(u64, napi, OFF_napi_struct_dev);
  ARGS;
  SET(NAPI_POLL, NAPI, napi);
  SET(NAPI_POLL, WORK, ARG(napi_poll, work));
  SET(NAPI_POLL, BUDGET, ARG(napi_poll, budget));
  SET(NAPI_POLL, IFINDEX, device ? READ(u32, device, OFF_net_device_ifindex) : 0);
  return EMIT(NAPI_POLL);
}

/* A reset for no socket of ours answers a packet: its addresses, seen from our side. */
int raw_tcp_send_reset(u64 *ctx) {
  u64 sk = ARG(tcp_send_reset, sk), skb = ARG(tcp_send_reset, skb);
  ARGS;
  set_sock(args, sk);
  if (sk) {
    SET(TCP_SEND_RESET, STATE, READ(u8, sk, OFF_sock___sk_common_skc_state));
    SET(TCP_SEND_RESET, NETNS_INO, netns_of_sock(sk));
  } else if (skb) {
    struct headers h = {};
    parse(network_header(skb), swap16(READ(u16, skb, OFF_sk_buff_protocol)), &h);
    SET(TCP_SEND_RESET, SADDR, h.daddr);
    SET(TCP_SEND_RESET, DADDR, h.saddr);
    SET(TCP_SEND_RESET, SPORT, h.dport);
    SET(TCP_SEND_RESET, DPORT, h.sport);
    SET(TCP_SEND_RESET, FAMILY, h.family);
  }
#ifdef ARG_tcp_send_reset__reason
  SET(TCP_SEND_RESET, REASON, ARG(tcp_send_reset, reason));
#endif
  return EMIT(TCP_SEND_RESET);
}

int raw_kfree_skb(u64 *ctx) {
  u64 skb = ARG(kfree_skb, skb);
  ARGS;
  SET(KFREE_SKB, SKB, skb);
  SET(KFREE_SKB, LOCATION, ARG(kfree_skb, location));
  SET(KFREE_SKB, PROTOCOL, swap16(READ(u16, skb, OFF_sk_buff_protocol)));
#ifdef ARG_kfree_skb__reason
  SET(KFREE_SKB, REASON, ARG(kfree_skb, reason));
#endif
#ifdef ARG_kfree_skb__rx_sk
  SET(KFREE_SKB, RX_SK, ARG(kfree_skb, rx_sk));
#endif
  return EMIT(KFREE_SKB);
}

/* --- signals */
#define SI_KERNEL 0x80

/* two values stand for "no information, from a user" and "from the kernel" */
static __always_inline s32 signal_code(u64 info) {
  if (info == 0)
    return 0;
  if (info == 1)
    return SI_KERNEL;
  return READ(s32, info, OFF_kernel_siginfo_si_code);
}

int raw_signal_generate(u64 *ctx) {
  u64 task = ARG(signal_generate, task);
  ARGS;
  SET_TASK(SIGNAL_GENERATE, task);
  SET(SIGNAL_GENERATE, SIG, ARG(signal_generate, sig));
  SET(SIGNAL_GENERATE, GROUP, ARG(signal_generate, group));
  SET(SIGNAL_GENERATE, RESULT, ARG(signal_generate, result));
  SET(SIGNAL_GENERATE, CODE, signal_code(ARG(signal_generate, info)));
  return EMIT(SIGNAL_GENERATE);
}

int raw_signal_deliver(u64 *ctx) {
  u64 action = ARG(signal_deliver, ka);
  ARGS;
  SET(SIGNAL_DELIVER, SIG, ARG(signal_deliver, sig));
  SET(SIGNAL_DELIVER, CODE, signal_code(ARG(signal_deliver, info)));
  SET(SIGNAL_DELIVER, SA_HANDLER, READ(u64, action, OFF_k_sigaction_sa_sa_handler));
  SET(SIGNAL_DELIVER, SA_FLAGS, READ(u64, action, OFF_k_sigaction_sa_sa_flags));
  return EMIT(SIGNAL_DELIVER);
}
