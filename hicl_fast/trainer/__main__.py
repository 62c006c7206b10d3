"""``python -m hicl_fast.trainer``, also under ``torchrun -m hicl_fast.trainer``."""

from hicl_fast._command import needs

with needs("trainer", __name__):
    from hicl_fast.trainer.cli import main

if __name__ == "__main__":
    main()
