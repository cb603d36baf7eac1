"""From a MELT checkpoint to a verified package: graphs, dialects, weights, parity."""
