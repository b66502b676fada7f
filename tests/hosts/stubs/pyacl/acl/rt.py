"""Stand-in for one compiled function: pyACL's `acl.rt.memcpy`.

pyACL comes with CANN; vllm-ascend's allocator imports this function by name and calls it
only to move weights in sleep mode.
"""

from typing import NoReturn


def memcpy(*args: object) -> NoReturn:
    raise NotImplementedError("acl.rt.memcpy copies device memory; there is no device")
