"""Moving frames between one server and its clients: ZeroMQ over tcp, ipc, or within one process."""
