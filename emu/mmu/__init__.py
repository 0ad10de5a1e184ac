"""The memory management unit: entry formats, walker, TLB and faults, by the Intel SDM vol. 3A chapter 4."""
