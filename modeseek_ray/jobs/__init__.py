"""The life of a job: state table, store, attempts, leases, and the reconciler that moves it on."""
