"""Generation of tokens that leave at exits of their own."""

from offramp.generation.choosing import Sampling, stop_at
from offramp.generation.decoders import Decoder, decoder_of
from offramp.generation.heads import TokenExits, attach_tokens
from offramp.generation.loop import Generated, Scored, generate, score
from offramp.generation.reference import generate_without_cache
from offramp.generation.rules import TokenPolicy
from offramp.generation.searching import search

__all__ = [
    "Decoder",
    "Generated",
    "Sampling",
    "Scored",
    "TokenExits",
    "TokenPolicy",
    "attach_tokens",
    "decoder_of",
    "generate",
    "generate_without_cache",
    "score",
    "search",
    "stop_at",
]
