"""`make bench-cluster`: replicated volumes beside Ceph's, three replicas each, all daemons on this machine."""
