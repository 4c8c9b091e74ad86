"""What the models of this package are to transformers."""

from transformers import PreTrainedModel


class PreTrained(PreTrainedModel):
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers calls ``_init_weights`` for modules without parameters of their own, too: it
        writes only to parameters that have not been loaded."""
        return False
