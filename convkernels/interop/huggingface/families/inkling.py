"""Inkling: profiles of distances, mixed as each query predicts; nothing beyond rel_extent."""

from torch import Tensor

from ..swapping import Adapter
from .common import expect_interface, heads


class Inkling:
    """Inkling's attention, whose position bias is what the queries predict, [B,H,T,R]."""

    def forward(self, *args, **options):
        expect_interface(self)
        return super().forward(*args, **options)

    def relative_terms(self, states: Tensor, T: int, S: int) -> dict:
        bank = self.rel_logits_proj if hasattr(self, "rel_logits_proj") else self.relative_position_bias
        profiles = bank(None, None, None)
        window = (profiles.shape[1] - 1, 0)
        return dict(rel_query=states.transpose(1, 2), query_rel=profiles.flip(1), window=window, outside="zero")


class InklingProfiles:
    def forward(self, relative_states: Tensor | None, query_positions, key_positions) -> Tensor:
        return self.proj if relative_states is None else relative_states.transpose(1, 2)


class Inkling2Profiles:
    def forward(self, hidden_states: Tensor | None, relative_distance, position_ids: Tensor | None) -> Tensor:
        if hidden_states is None:
            return self.proj
        states = heads(self.linear(hidden_states), self.proj.shape[0])
        return self.norm(states, position_ids).transpose(1, 2)


class _Stock:
    """The attention interface of modules without positions, over a few states: their own function."""

    @staticmethod
    def get_interface(name: str, default):
        return default


def _no_distances(inputs_embeds: Tensor, *caches, **kinds) -> Tensor:
    return inputs_embeds.new_empty(0)


_RESIDUAL = Adapter(functions={"ALL_ATTENTION_FUNCTIONS": _Stock}, masks=True)

INKLING = {
    "inkling.InklingAttention": Adapter(Inkling, masks=True),
    "inkling.InklingRelativeLogits": Adapter(InklingProfiles, masks=True),
}
for _family, _name in (("inkling2", "Inkling2"), ("inkling2_loop", "Inkling2Loop")):
    INKLING |= {
        f"{_family}.{_name}TextModel": Adapter(functions={"get_relative_distance": _no_distances}, masks=True),
        f"{_family}.{_name}SlidingAttention": Adapter(Inkling, masks=True),
        f"{_family}.{_name}FullAttention": Adapter(Inkling, masks=True),
        f"{_family}.{_name}RelativePositionBias": Adapter(Inkling2Profiles, masks=True),
        f"{_family}.{_name}BlockAttentionResidual": _RESIDUAL,
    }
INKLING["inkling2_loop.Inkling2LoopMessageAttentionResidual"] = _RESIDUAL
