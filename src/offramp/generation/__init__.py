"""Generation of tokens that leave at exits of their own."""

from offramp.generation.choosing import Sampling, stop_at
from offramp.generation.decoders import Decoder, decoder_of
from offramp.generation.heads import TokenExits, attach_tokens
from offramp.generation.loop import Generated, Scored, generate, score
from offramp.generation.lossless import Draft, DraftTimes, Verified, choose_draft, generate_lossless
from offramp.generation.reference import generate_without_cache
from offramp.generation.rules import TokenPolicy
from offramp.generation.searching import search

__all__ = [
    "Decoder",
    "Draft",
    "DraftTimes",
    "Generated",
    "Sampling",
    "Scored",
    "TokenExits",
    "TokenPolicy",
    "Verified",
    "attach_tokens",
    "choose_draft",
    "decoder_of",
    "generate",
    "generate_lossless",
    "generate_without_cache",
    "score",
    "search",
    "stop_at",
]
