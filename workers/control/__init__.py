"""The embedded servers of rank 0: nats-server and etcd."""
