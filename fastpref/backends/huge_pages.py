"""torch's setting of huge pages for a CPU's large blocks of memory."""

from __future__ import annotations

# Of the environment: torch aligns a CPU's blocks of 2 MiB and more to huge pages if it is "1" at
# torch's first allocation. Such blocks leave fewer holes in malloc's heap, so that the peak of a
# training is 10 to 15 % lower. It belongs to trainings, which keep freed memory. Where memory goes
# back to the system after each call, huge pages do not pay: the head took 8 % less time in calls
# one after another, and 40 % more with a pause of a second between them, on a virtual machine that
# returns free blocks of 2 MiB to its host.
TORCH_SETTING = "THP_MEM_ALLOC_ENABLE"
