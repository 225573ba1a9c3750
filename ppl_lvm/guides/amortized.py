"""Encoders: the parameters of a row's latent sites as a network of its data."""

from pydantic import Field

from ppl_lvm import nets
from ppl_lvm.algorithm import GuideFamily
from ppl_lvm.errors import ProgramError
from ppl_lvm.latents import Sketch


class amortized(GuideFamily):
    """`q(z_n | x_n) = Normal(u_n; loc(x_n), scale(x_n)) |du / dz|`, with `loc, log scale` a multi-layer perceptron.

    The encoder sees all data arguments of a row, flattened and joined in the program's order. Discrete sites of a row
    get its logits. Sites outside the data plate are as in `auto_normal`.

    Args:
        hidden: widths of the encoder's hidden layers.
        activation: their activation.
        scale: initial standard deviation, multiplied by the encoder's output near one.

    Raises:
        ProgramError: the model has no latent site inside a data plate, or the program takes no data.

    Source: Kingma and Welling (2013), Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> amortized(hidden=(64, 64)).hidden
        (64, 64)
    """

    hidden: tuple[int, ...] = (128,)
    activation: str = "tanh"
    scale: float = Field(default=0.1, gt=0)

    def __call__(self, sketch: Sketch) -> None:
        ppl, xp = sketch.ppl, sketch.ppl.xp
        rows = [s for s in sketch.latents if s.row_dim is not None]
        if not rows or not sketch.data:
            raise ProgramError(
                f"Guide 'amortized' encodes the latent sites of a row from its data, but the model's latent sites "
                f"{[s.name for s in sketch.latents]} are outside a data plate, or the program takes no data; use "
                f"'auto_normal'."
            )
        # Times one: counts become floats of the fit's precision.
        data = xp.concat([xp.reshape(1.0 * x, (x.shape[0], -1)) for x in sketch.data.values()], axis=-1)
        outputs = sum(s.size * (1 if s.discrete else 2) for s in rows)
        encoder = ppl.module(
            "auto.encoder", nets.MLP(data.shape[-1], outputs, hidden=self.hidden, activation=self.activation)
        )
        code, at = encoder(data), 0
        for s in sketch.latents:
            if s.row_dim is None:
                sketch.mean_field(s, self.scale)
                continue
            shape = (code.shape[0], *s.inner, *s.event)
            loc, at = sketch.spread(s, xp.reshape(code[:, at : at + s.size], shape)), at + s.size
            with sketch.inside(s.plates):
                if s.discrete is not None:
                    sketch.sample_discrete(s, loc)
                    continue
                width, at = sketch.spread(s, xp.reshape(code[:, at : at + s.size], shape)), at + s.size
                sketch.sample(s, ppl.dist.Normal(loc, self.scale * xp.exp(width)))
