"""Steps of servers, whose states lie in a pool, that `triton` compiles beside those of plain decoding."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from convkernels.backends.triton.conv import launch_step
from convkernels.ops.conv.schema import SIGMOID, SILU, TapStep


@dataclass(frozen=True)
class StepVariant:
    """A step with SiLU, one channel to a head. time: T of x [B,T,C], 0 for x [B,C]; that of all
    sequences if they are packed. extra: rows of a state beyond the span. rows_last: rows of a state, not channels, lie
    side by side in memory."""

    name: str
    taps: int = 4
    channels: int = 1024
    time: int = 0
    extra: int = 0
    rows_last: bool = False
    accepted: bool = False
    packed: bool = False
    saves: bool = False
    dynamic: bool = False
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 256
    slots: int = 1024

    def launches(self, _architecture: int) -> Iterator[tuple]:
        """(kernel, arguments) of the one launch."""
        sequences, slots, rows = self.sequences, self.slots, self.taps - 1 + self.extra

        def empty(*shape, given=True, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype, device="meta") if given else None

        def integers(count, given=True, dtype=torch.int32):
            return empty(count, given=given, dtype=dtype)

        leading = (1 if self.packed else sequences, *((self.time,) if self.time else ()))
        pool = (slots, self.channels, rows) if self.rows_last else (slots, rows, self.channels)
        x, state = empty(*leading, self.channels), empty(*pool)
        args = TapStep(
            x, state.transpose(1, 2) if self.rows_last else state,
            empty(*(leading if self.dynamic else ()), self.channels, self.taps), 1, self.dynamic, self.dynamic,
            empty(self.channels), None, None, integers(sequences, self.dynamic, torch.int64), SIGMOID, SILU, None,
            None, integers(sequences), integers(sequences, self.accepted), integers(sequences + 1, self.packed),
            integers(32, self.saves), integers(32, self.saves),
        )  # fmt: skip
        kernel, _, arguments = launch_step.step_launch(args, torch.empty_like(x))
        yield kernel, arguments


STEP_VARIANTS = (
    StepVariant("step slots K=4"),
    StepVariant("step slots rows last K=4", rows_last=True),
    StepVariant("step slots accepted K=4", time=4, extra=4, accepted=True),
    StepVariant("step slots accepted rows last K=4", time=4, extra=4, accepted=True, rows_last=True),
    StepVariant("step packed saves K=4", time=4096, packed=True, saves=True),
    StepVariant("step packed rows last float32 K=4", time=4096, packed=True, rows_last=True, dtype=torch.float32),
    StepVariant("step packed K=31", 31, time=4096, packed=True),
    StepVariant("step dynamic packed saves accepted K=4", time=4096, extra=4, packed=True, saves=True, accepted=True,
                dynamic=True),
)  # fmt: skip
