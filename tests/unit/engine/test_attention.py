"""The choice of attention's kernel, which is the whole process's."""

from __future__ import annotations

import torch

from graft.engine.multi.attention import attention_kernel, attention_kernel_as_now

CPU = torch.device("cpu")


def is_fused() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def test_threads_that_overlap_leave_the_kernel_as_the_first_found_it() -> None:
    before = is_fused()
    one, other = attention_kernel(8, CPU), attention_kernel(8, CPU)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not is_fused()
    other.__exit__(None, None, None)
    assert is_fused() == before


def test_a_choice_is_made_again_as_it_was() -> None:
    with attention_kernel(8, CPU):
        chosen = attention_kernel_as_now()
    untouched = attention_kernel_as_now()
    assert is_fused()
    with chosen:
        assert not is_fused()
    with untouched:
        assert is_fused()
