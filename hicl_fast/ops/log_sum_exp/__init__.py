"""Row statistics of cosine similarities, differentiable: what InfoNCE is made of."""
