"""The gRPC and HTTP service. Its room is kept; today the command line reads the stores itself (`cli/why.py`)."""
