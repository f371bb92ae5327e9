"""The demonstration: a small settlement service, the batch job that disturbs it, and the run that explains what happened.

`settlement` is the service, `clearing` its peer, `batch` the batch job, `run` the scenario behind `kprobe demo`. The service
knows nothing of kprobe: it writes its own log, as any service does.
"""
