"""Measured constants: the memory and time that ONNX Runtime's CPU provider and glibc take, from which plans are made.

All were measured with ONNX Runtime 1.32.0 on x86-64 Linux with glibc and AVX-512, 2 cores, in November 2026, by
`bench/memory.py`: pictogram, and random weights in the sizes of Stable Diffusion 1.5 and SDXL.
`tests/runtime/memory/test_memory_plan.py` holds that predictions are within 10 % of peaks. Another version of ONNX
Runtime may need other values.
"""

# Arena fragmentation: how many times the bytes of live values the arena takes.
ARENA_WHOLE = 1.45
"""A graph that runs whole."""
ARENA_WHOLE_INT8 = 1.6
"""A graph with int8 convolutions that runs whole."""
ARENA_WHOLE_INT8_VAE = 1.25
"""A VAE with int8 convolutions that runs whole."""
ARENA_WHOLE_UPSCALER = 1.8
"""A tile of an upscaler, in float32 or int8; the largest tiles of RRDBNet take less. By `bench/upscale.py`."""
ARENA_WHOLE_CIRCULAR_VAE = 2.05
"""A VAE that runs whole in float32 with circular padding: what is padded doesn't fit where what isn't has been."""
ARENA_STAGED = 1.4
"""A graph that runs in stages."""
ARENA_RESIDENT_STAGE = 0.045
"""Added to ARENA_STAGED for each resident stage, whose weights lie in the arena between values; at most 1."""

# The arena's regions.
ARENA_REGION = 1.5
"""First arena region, as a multiple of the planned arena bytes, so that no second, larger one is needed."""
ARENA_BOOKKEEPING = 1 / 32
"""Bookkeeping bytes for each byte of a region; from BFCArena's source."""
ARENA_SMALL_REGIONS = 0.13
"""The share that fragmentation adds if the first region is too small; held by `test_two_budgets_in_one_process`."""

# Sessions.
NODE_BYTES = 8192
"""A session's bytes for each node."""
CONV_REORDER = 4
"""Copies of a conv weight while a session reorders it: its file, what is read of it, and the result twice."""
INT8_BLOCK_SUMS = 1 / 5
"""Bytes of block sums for each byte of a dequantized MatMul weight."""
INT8_FRAGMENTATION = 1 / 2
"""Bytes left between prepacked weights for each byte of a dequantized MatMul weight, in a graph that runs whole."""

# Merging LoRA: float32 copies of a weight; held by `test_merging_a_lora_takes_the_planned_memory`.
MERGE_CONV = 2.25
MERGE_LINEAR = 3.25
MERGE_INT4 = 0.85
"""Added for int4."""

# Times, rough.
OPEN_BYTES_PER_SECOND = 0.8e9
"""Weights opened."""
ALLOCATE_BYTES_PER_SECOND = 3e9
"""Fresh pages handed out."""
INT8_SPEEDUP = 2.2
"""Of MACs in int8 over those in float32."""

# The process.
PROCESS_BYTES = 24 << 20
"""The code that runs, tokenizers and all that is small, resident after a plan is made."""
LASTING_BYTES = 6 << 20
"""What of that stays at most: 3 to 5 MB after images by pictogram. Code is unmapped before each plan."""
FREE_SHARE = 0.9
"""The share of the free memory that ``auto`` takes."""
