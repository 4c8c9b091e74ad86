"""The attention of transformers models with relative positions, family by family, by ``composite_attention``.

Modules that call transformers' attention interface keep their ``forward``: what made a tensor of T x T of positions
makes the arguments of ``composite_attention`` instead, which ``attention_forward`` gets as the position bias. Modules
that compute their attention themselves get another ``forward``.
"""

from .alibi import ALIBI
from .buckets import BUCKETS
from .deberta import DEBERTA
from .inkling import INKLING
from .speech import SPEECH

ADAPTERS = ALIBI | BUCKETS | DEBERTA | INKLING | SPEECH
"""By the folder of transformers.models and the name of the class."""
