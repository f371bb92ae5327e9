"""What every other room shares: records, schemas, event kinds, identities, topics, settings and errors.

Nothing here imports another room of kprobe, opens a socket or needs BCC.
"""
