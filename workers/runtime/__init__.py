"""The planes between processes: discovery (etcd), events (NATS), requests (ZMQ)."""
