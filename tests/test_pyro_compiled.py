"""What Inductor is asked for on the Pyro backend."""

from typing import Any

import pytest
import torch
from torch import _inductor
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_lvm.backends._pyro_train import OPTIONS


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="about C++")
def test_threads_are_not_started_inside_loops() -> None:
    """A sum over draws, as in the gradient of VIMCO's codes: once per kernel, not for each of the 25,600 entries."""

    def summed(index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ((index.unsqueeze(-1) == torch.arange(2)) * weight[..., None, None]).sum(0)

    given: list[Any] = [torch.randint(0, 2, (10, 128, 200)), torch.randn(10, 128)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        graph = make_fx(summed)(*given)
        found, (code,) = run_and_get_code(lambda: _inductor.compile(graph, given, OPTIONS)(*given))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, summed(*given))
    depths = [
        (len(line) - len(line.lstrip()), line.strip())
        for line in code[code.index("void  kernel") :].splitlines()
        if line.strip() not in ("", "{", "}")
    ]
    loops, started = list[int](), 0
    for depth, line in depths:
        loops = [outer for outer in loops if outer < depth]
        if line.startswith("for("):
            loops.append(depth)
        if line.startswith("#pragma omp parallel"):
            started += 1
            assert not loops, f"inside {len(loops)} loops"
    assert started
