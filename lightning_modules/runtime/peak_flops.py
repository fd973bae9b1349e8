"""Peak rates of GPUs for dense matrices, from the datasheets of their makers, for the model FLOP utilisation."""

import re

import torch

# Device names as `torch.cuda.get_device_name` gives them, without the maker; then the peaks in TFLOP/s, by format.
# All are of dense matrices with sums in float32. Datasheets also print rates of sparse matrices, twice as high; where a
# datasheet prints only those, the entry is half of it. `float32` is without the matrix units, `tf32` with them.
_Peaks = dict[str, float]


def _half(half: float, tf32: float, float32: float) -> _Peaks:
    """Return the peaks of a GPU whose float16 and bfloat16 rates are the same."""
    return {"float16": half, "bfloat16": half, "tf32": tf32, "float32": float32}


_H100_SXM = _half(989.4, 494.7, 66.9)  # NVIDIA H100 Tensor Core GPU Architecture (whitepaper), table of H100 SXM5
_H100_NVL = _half(835.5, 417.5, 60.0)  # NVIDIA H100 datasheet, NVL: 1,671 and 835 sparse

_TABLE: dict[str, _Peaks] = {
    r"(Tesla )?V100-SXM[23]-\d+GB(-\w+)?": {"float16": 125.0, "float32": 15.7},  # NVIDIA V100 datasheet (2020)
    r"(Tesla )?V100-PCIE-\d+GB": {"float16": 112.0, "float32": 14.0},  # NVIDIA V100 datasheet (2020)
    r"(Tesla )?T4": {"float16": 65.0, "float32": 8.1},  # NVIDIA T4 datasheet
    r"A100(-(SXM4|PCIE)-\d+GB| 80GB PCIe)": _half(312.0, 156.0, 19.5),  # NVIDIA A100 datasheet (2022), SXM and PCIe
    r"A10": _half(125.0, 62.5, 31.2),  # NVIDIA A10 datasheet; the A10G is another GPU
    r"A40": _half(149.7, 74.8, 37.4),  # NVIDIA A40 datasheet
    r"L4": _half(121.0, 60.0, 30.3),  # NVIDIA L4 datasheet: 242 and 120 sparse
    r"L40": _half(181.05, 90.5, 90.5),  # NVIDIA L40 datasheet
    r"L40S": _half(362.05, 183.0, 91.6),  # NVIDIA L40S datasheet: 366 of TF32 sparse
    r"H100 (SXM\d )?\d+GB HBM[23]e?": _H100_SXM,
    r"H100 PCIe": _half(756.0, 378.0, 51.0),  # NVIDIA H100 datasheet, PCIe: 1,513 and 756 sparse
    r"H100 NVL": _H100_NVL,
    r"H200": _H100_SXM,  # NVIDIA H200 datasheet, SXM: the compute of the H100
    r"H200 NVL": _H100_NVL,  # NVIDIA H200 datasheet, NVL: 1,671 and 835 sparse
    r"GH200 \d+GB": _H100_SXM,  # NVIDIA GH200 datasheet: 1,979 and 989 sparse
    r"B100": _half(1750.0, 900.0, 60.0),  # NVIDIA Blackwell Architecture Technical Brief: 3,500 and 1,800 sparse
    r"B200": _half(2250.0, 1125.0, 75.0),  # NVIDIA DGX B200 datasheet, an eighth; 4,500 and 2,250 sparse
    r"GeForce RTX 4090": _half(165.2, 82.6, 82.6),  # NVIDIA Ada GPU Architecture (whitepaper), appendix
    r"GeForce RTX 5090": _half(209.5, 104.8, 104.8),  # NVIDIA RTX Blackwell GPU Architecture (whitepaper), appendix
    r"RTX 6000 Ada Generation": _half(364.2, 182.1, 91.1),  # NVIDIA RTX 6000 Ada datasheet and Ada whitepaper
    r"Instinct MI300X( OAM)?": _half(1307.4, 653.7, 163.4),  # AMD Instinct MI300X datasheet
}


def peak_flops(device_name: str, number_format: str) -> float | None:
    """Return the floating-point operations a second that a GPU can do at most, or `None` if they are unknown.

    Args:
        device_name: Name of the GPU, from `torch.cuda.get_device_name`.
        number_format: `bfloat16`, `float16`, `tf32` or `float32`.
    """
    name = re.sub(r"^(NVIDIA|AMD) ", "", device_name)
    for pattern, peaks in _TABLE.items():
        if re.fullmatch(pattern, name) and number_format in peaks:
            return peaks[number_format] * 1e12
    return None


def format_of(precision: str) -> str | None:
    """Return the number format of the matrix products of a `trainer.precision`, or `None` for those without a peak."""
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    if precision.startswith("32"):
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return None
