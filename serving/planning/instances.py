"""SageMaker's instance types with NVIDIA GPUs: what they have and what they cost.

Figures of the vendors' own pages, not measured by us; prices are in US dollars an hour and differ by region.
"""

from dataclasses import dataclass

PRICES_OF = "us-east-1, on demand, as published up to November 2026"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory_mib: what the driver reports.
        bandwidth_gb: GB a second between memory and processor, on paper.
        bfloat16: whether it computes in that type.
    """

    name: str
    memory_mib: int
    bandwidth_gb: int
    bfloat16: bool = True


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance type."""

    name: str
    gpu: Gpu
    gpu_count: int
    price: float


T4 = Gpu("T4", 15360, 320, bfloat16=False)
A10G = Gpu("A10G", 23028, 600)
L4 = Gpu("L4", 23034, 300)
L40S = Gpu("L40S", 46068, 864)
A100_40 = Gpu("A100 40 GB", 40960, 1555)
H100 = Gpu("H100", 81559, 3350)

INSTANCES = (
    Instance("ml.g4dn.xlarge", T4, 1, 0.736),
    Instance("ml.g4dn.2xlarge", T4, 1, 0.94),
    Instance("ml.g4dn.12xlarge", T4, 4, 4.89),
    Instance("ml.g5.xlarge", A10G, 1, 1.408),
    Instance("ml.g5.2xlarge", A10G, 1, 1.515),
    Instance("ml.g5.12xlarge", A10G, 4, 7.09),
    Instance("ml.g5.48xlarge", A10G, 8, 20.36),
    Instance("ml.g6.2xlarge", L4, 1, 1.222),
    Instance("ml.g6.12xlarge", L4, 4, 5.752),
    Instance("ml.g6.48xlarge", L4, 8, 16.688),
    Instance("ml.g6e.xlarge", L40S, 1, 2.61),
    Instance("ml.g6e.2xlarge", L40S, 1, 2.80),
    Instance("ml.g6e.12xlarge", L40S, 4, 13.12),
    Instance("ml.g6e.48xlarge", L40S, 8, 37.66),
    Instance("ml.p4d.24xlarge", A100_40, 8, 37.688),
    Instance("ml.p5.48xlarge", H100, 8, 113.068),
)
