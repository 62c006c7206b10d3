"""Which tile each kernel takes: data, read and explained by kernels/tiles.py, written by ``python -m tools.apply_tiles``.

``measured`` is the time of the kernels that the entry is for, beside the card and the day; the sizes are in the file of
benchmarks/results that it comes from.
"""

# Where the operands' rows begin at multiples of 16 bytes, so that the hardware can copy blocks of them.
ALIGNED = """
arch         operand  use         tile        warps  stages  band  regs  how                    measured
interpreter  16 bit   any         32×32×32    1      1       2     -     described, persistent  not timed
sm_90        16 bit   exp         128×256×64  8      3       8     -     described, persistent  1.620 ms, H100, 2026-11-26
sm_90        16 bit   heavy exp   128×128×64  8      4       8     -     described, persistent  not timed
sm_90        16 bit   listed      128×128×64  8      4       8     -     described              not timed
sm_90        16 bit   narrow      128×128×64  8      4       8     -     described, persistent  not timed
sm_90        16 bit   statistics  128×256×64  8      3       8     -     described, persistent  not timed
"""

# Wherever they begin.
ANYWHERE = """
arch         operand  use  tile        warps  stages  band  regs  how  measured
any          fp32     any  64×64×16    8      3       8     -     -    not timed
gfx942       16 bit   any  128×128×64  8      2       8     -     -    not timed
interpreter  any      any  32×32×32    1      1       2     -     -    not timed
sm_100       16 bit   any  128×64×64   8      3       8     -     -    not timed
sm_100       tf32     any  128×64×32   8      3       8     -     -    not timed
sm_80        16 bit   any  128×128×32  8      4       8     -     -    not timed
sm_80        tf32     any  128×64×32   8      3       8     -     -    not timed
sm_90        16 bit   any  128×128×64  8      3       8     -     -    not timed
sm_90        tf32     any  128×128×32  8      3       8     -     -    not timed
"""
