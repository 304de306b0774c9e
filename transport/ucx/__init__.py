"""UCX, for the tensor plane and for the M2N channel alike: contexts, workers, endpoints, and whether it works here."""
