"""Each row's own columns, ragged: their log-sum-exp."""
