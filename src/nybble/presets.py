"""Quantizers by name, as data: each is one quantizer line.

Sections are those of the number-format literature: OCP MX v1.0; NVFP4; block floating point; QLoRA; compressed-tensors'
integers.
"""

_BNB8 = (
    "dynamic8 flat=256 scale_format=float32 rounding=nearest-even-float32 reciprocal=true"  # bitsandbytes' 8-bit blocks
)


def _scales(line: str) -> str:
    """Scales and minima of one line; the scale of minima is negative."""
    return f"scale_format=({line} scale=least-squares) offset_format=({line} scale=least-squares)"


PRESETS: dict[str, str] = {
    # OCP Microscaling v1.0: 32 elements share a power of two (E8M0), floor rule
    "mxfp8": "float8_e4m3fn group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "mxfp8_e5m2": "float8_e5m2 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "mxfp6": "float6_e2m3fn group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "mxfp6_e3m2": "float6_e3m2fn group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    # MXFP4 by the better of two exponents for each block, which a reader can't tell from the others; by the
    # specification (and ggml), as compressed-tensors ("ct"), ModelOpt and MLX choose them
    "mxfp4": "float4_e2m1fn group=32 scale=pow2(mode=search) scale_format=(float8_e8m0fnu scale=one)",
    "mxfp4-ocp": "float4_e2m1fn group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "mxfp4-modelopt": "float4_e2m1fn group=32 scale=pow2(mode=rceil) scale_format=(float8_e8m0fnu scale=one)",
    "mxfp4-mlx": "float4_e2m1fn group=32 scale=pow2(mode=nearest) scale_format=(float8_e8m0fnu scale=one)",
    "mxint8": "int8 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    # NVFP4: 16 elements share an E4M3 scale, over one float32 for the tensor
    "nvfp4": "float4_e2m1fn group=16 scale_format=(float8_e4m3fn tensor floor=normal)",
    # ... whose blocks end at 6 or at 4, whichever loses less (Cook et al. 2025, "Four Over Six"), or at the best of all
    # scales between and around: a reader can't tell the files from the others
    "nvfp4-46": (
        "float4_e2m1fn group=16 scale=stored(low=1,high=1.5,grid=2) "
        "scale_format=(float8_e4m3fn tensor scale=absmax(target=256) floor=normal)"
    ),
    "nvfp4-search": "float4_e2m1fn group=16 scale=stored scale_format=(float8_e4m3fn tensor floor=normal)",
    # Scales for which E2M1 becomes E4M3 by a shift of the exponent (Wu et al. 2023, ZeroQuant-FP; their groups have 256
    # where that divides the columns): powers of two (M1), or powers of two times one number a row (M2), to the nearest
    # ratio, which loses less than the published scale=pow2-ratio(mode=down)
    "fp4-m1": "float4_e2m1fn group=64 scale=pow2(mode=rceil) scale_format=(float8_e8m0fnu scale=one)",
    "fp4-m2": "float4_e2m1fn group=64 scale=pow2-ratio",
    # As compressed-tensors calculates them: power-of-two scales by the mode "even", and NVFP4 over a stored divisor
    "mxfp4-ct": "float4_e2m1fn group=32 scale=pow2(mode=even) scale_format=(float8_e8m0fnu scale=one)",
    "mxfp6-ct": "float6_e2m3fn group=32 scale=pow2(mode=even) scale_format=(float8_e8m0fnu scale=one)",
    "nvfp4-ct": "float4_e2m1fn group=16 scale=two-level scale_format=(float8_e4m3fn tensor)",
    # Block floating point with 8-bit exponents: name = element bits (sign included) + 8
    "bfp16": "int8 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "bfp14": "int6 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "bfp12": "int4 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "bfp10": "int2 group=32 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "msfp12": "int4 group=16 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    "msfp16": "int8 group=16 scale=pow2 scale_format=(float8_e8m0fnu scale=one)",
    # QLoRA (Dettmers et al. 2023): row-major blocks of 64; "dq": the scales in dynamic 8 bits per 256, around their
    # mean. The names with "bnb" are bitsandbytes bit for bit: it finds the codes with the scales before these are
    # rounded, and compares with constants of its own. Its code off the GPU differs in two places: FP4 is compared with
    # float32 midpoints ("-cpu"), and 8 bits are looked up in 65,536 cells of [-1, 1], not always finding the nearest.
    "nf4-bnb": "nf4 flat=64 scale_format=float32 rounding=native reciprocal=true",
    "fp4-bnb": "fp4_bnb flat=64 scale_format=float32 rounding=native reciprocal=true",
    "fp4-bnb-cpu": "fp4_bnb flat=64 scale_format=float32 rounding=half-down-float32 reciprocal=true",
    "nf4-bnb-dq": f"nf4 flat=64 rounding=native reciprocal=true raw_scale=true scale_format=({_BNB8} center=mean)",
    "fp4-bnb-dq": f"fp4_bnb flat=64 rounding=native reciprocal=true raw_scale=true scale_format=({_BNB8} center=mean)",
    "nf4-dq": f"nf4 flat=64 scale_format=({_BNB8} center=mean)",
    "fp4-dq": f"fp4_bnb flat=64 scale_format=({_BNB8} center=mean)",
    # 8-bit optimizer states (Dettmers et al. 2022) and 4-bit ones (Li et al. 2023)
    "state8": _BNB8,
    "state8-unsigned": f"u{_BNB8}",
    "state4": "dynamic4 flat=128 scale_format=float32 rounding=half-down",
    "state4-unsigned": "linear4 rank1 rounding=half-down",
    # ... and two others in 8: E4M3 (torchao's), and companded, finer towards 0
    "state-fp8": "float8_e4m3fn flat=256 scale_format=float32",
    "state8-companded": "companded8 flat=256 scale_format=float32",
    "state8-companded-unsigned": "ucompanded8 flat=256 scale_format=float32",
    # compressed-tensors' integers use all 16 codes; symmetric ones divide by 7.5, asymmetric ones add the zero point
    # before rounding
    "int4-ct": "int4_full group=128 scale=absmax(target=7.5) scale_format=float32",
    "int8-ct": "int8_full channel scale=absmax(target=127.5)",
    "int4-ct-asym": "int4_full group=128 symmetric=false scale_format=float32 rounding=nearest-even-code",
    "int8-ct-asym": "int8_full channel symmetric=false rounding=nearest-even-code",
    # per-token and per-channel 8-bit floats
    "fp8-token": "float8_e4m3fn token",
    "fp8-channel": "float8_e4m3fn channel",
    # binary and ternary weights
    "b1.58": "ternary tensor scale=mean",
    "xnor": "binary channel scale=mean",
    # GGUF's block types (ggml-common.h): with K-quants, scales and minima are themselves in four to eight bits over
    # float16. Scales by least squares; a reader can't tell how they were found
    "q4_0": "int4_full group=32 scale=least-squares scale_format=float16",
    "q4_1": "uint4 group=32 scale=least-squares(offset=true) scale_format=float16",
    "q5_0": "int5_full group=32 scale=least-squares scale_format=float16",
    "q5_1": "uint5 group=32 scale=least-squares(offset=true) scale_format=float16",
    "q8_0": "int8_full group=32 scale=least-squares scale_format=float16",
    "q2_k": f"uint2 group=16 scale=least-squares(offset=true) {_scales('uint4 group=16')}",
    "q3_k": "int3_full group=16 scale=least-squares scale_format=(int6_full group=16 scale=least-squares)",
    "q4_k": f"uint4 group=32 scale=least-squares(offset=true) {_scales('uint6 group=8')}",
    "q5_k": f"uint5 group=32 scale=least-squares(offset=true) {_scales('uint6 group=8')}",
    "q6_k": "int6_full group=16 scale=least-squares scale_format=(int8_full group=16 scale=least-squares)",
    "iq4_nl": "iq4nl group=32 scale=least-squares scale_format=float16",
    "iq4_xs": "iq4nl group=32 scale=least-squares scale_format=(int6_full group=8 scale=least-squares)",
    "tq1_0": "ternary group=256 scale=least-squares scale_format=float16 packing=base3",
    "tq2_0": "table[-1,0,1,2] group=256 scale=least-squares scale_format=float16",
    "q1_0": "binary group=128 scale=least-squares scale_format=float16",
    "q2_0": "table[-1,0,1,2] group=64 scale=least-squares scale_format=float16",
}
