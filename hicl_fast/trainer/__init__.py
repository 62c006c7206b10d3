"""The reference trainer: contrastive sentence embeddings on ``transformers.Trainer``; run ``python -m hicl_fast.trainer``.

The data's path: ``text`` reads rows, ``slicing`` makes batches of token segments, ``token_pooling`` turns the encoder's
output into embeddings, ``methods`` computes the loss, ``trainer`` ties them to ``transformers.Trainer``. ``model`` opens and
saves encoders, and ``modules`` has what sentence-transformers' files say of them.
"""
