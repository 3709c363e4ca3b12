"""The two precisions every nested weight can be read at."""

from enum import StrEnum


class Precision(StrEnum):
    """`FP16` reads both bytes (the checkpoint's own 16 bits, float16 or bfloat16); `FP8` the upper byte."""

    FP16 = "fp16"
    FP8 = "fp8"
