"""Rules that choose `max_norm` from the norms seen so far."""

from gradclip.adaptive._numbers import Number as Number
from gradclip.adaptive._numbers import minimum as minimum
from gradclip.adaptive._numbers import where as where
from gradclip.adaptive._rule import ClippedByRule as ClippedByRule
from gradclip.adaptive._rule import Rule as Rule
