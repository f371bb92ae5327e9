"""Real faults with known truth: does kprobe name the right cause and the right culprit?

`python -m benchmarks.accuracy` starts real victims on the real kernel, injects one fault at a time, records with
`kprobe record`, judges with `kprobe analyze` (both as subprocesses) and compares with what is known from the injection
and from procfs, never from kprobe itself. Modules: `lab` (processes, cgroups, devices, networks, all undone at the end),
`scenarios_*` (the faults), `judge` (record and analyze), `score` and `baselines`. Needs root, gcc and iproute2.
"""
