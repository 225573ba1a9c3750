"""Inverse autoregressive flows in unconstrained space."""

import numpy as np
from pydantic import Field

from ppl_lvm import nets
from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.latents import Sketch


class flow(GuideFamily):
    """`u = loc + scale * f_L(... f_1(e))`, `e ~ Normal(0, I)`, with inverse autoregressive steps f.

    Each step is `f(e)_i = exp(s_i) e_i + m_i` with `m_i` and `s_i = tanh(.)` functions of `e_1 .. e_{i-1}`, the order
    reversed from one step to the next; `log q(u) = log Normal(e; 0, I) - sum s - sum log scale`, exact without an
    inverse. One u for all continuous sites outside the data plate, and one for those of every row, whose steps are
    shared by the rows (loc and scale are each row's own). Discrete sites get free logits.

    Args:
        steps: autoregressive steps L.
        hidden: widths of the hidden layers of each step's network.
        scale: initial standard deviation of u.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), Improved Variational Inference with Inverse
    Autoregressive Flow, arXiv:1606.04934.

    Example:
        >>> flow(steps=3).steps
        3
    """

    steps: int = Field(default=2, ge=1)
    hidden: tuple[int, ...] = (32,)
    scale: float = Field(default=0.1, gt=0)

    def __call__(self, sketch: Sketch) -> None:
        ppl, xp = sketch.ppl, sketch.ppl.xp
        for name, block in sketch.blocks():
            size = sum(s.size for s in block)
            spec = nets.Autoregressive(size, 2 * size, hidden=self.hidden)
            steps = [ppl.module(f"auto.{name}.step{i}", spec) for i in range(self.steps)]
            auxiliary = {"is_auxiliary": True}
            with sketch.inside(sketch.row_plates(block)):
                loc = sketch.table(block[0], f"auto.{name}.loc", np.concatenate([s.initial.ravel() for s in block]))
                scale = sketch.table(
                    block[0], f"auto.{name}.scale", np.full(size, self.scale), ppl.dist.constraints.positive
                )
                loc, scale = sketch.place(block, loc), sketch.place(block, scale)
                noise = ppl.sample(
                    f"auto.{name}.noise", ppl.dist.Normal(0.0 * loc, 1.0).to_event(1), infer=auxiliary
                )
                u, log_det = noise, xp.sum(xp.log(scale), axis=-1)
                for step in steps:
                    out = step(u)
                    log_scale = xp.tanh(out[..., size:])
                    u = xp.exp(log_scale) * u + out[..., :size]
                    log_det = log_det + xp.sum(log_scale, axis=-1)
                    u = xp.flip(u, axis=-1)
                vector = loc + scale * u
                vector = ppl.sample(
                    f"auto.{name}", ppl.dist.Delta(vector, -log_det, event_dim=1), infer=auxiliary
                )
            sketch.deal(block, vector)
        for latent in sketch.latents:
            if latent.discrete is not None:
                sketch.mean_field(latent, self.scale)
