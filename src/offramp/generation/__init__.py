"""Generation of tokens that leave at exits of their own."""

from offramp.generation.decoders import Decoder, decoder_of
from offramp.generation.heads import TokenExits, attach_tokens
from offramp.generation.loop import Generated, Scored, generate, score
from offramp.generation.reference import generate_without_cache

__all__ = [
    "Decoder",
    "Generated",
    "Scored",
    "TokenExits",
    "attach_tokens",
    "decoder_of",
    "generate",
    "generate_without_cache",
    "score",
]
