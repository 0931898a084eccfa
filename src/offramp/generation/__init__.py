"""Generation of tokens that leave at exits of their own."""

from offramp.generation.bundles import Said, TokenBundle
from offramp.generation.choosing import Sampling, stop_at
from offramp.generation.costs import measure_tokens
from offramp.generation.decoders import Decoder, decoder_of
from offramp.generation.encoders import resnet_encoder
from offramp.generation.gates import learn_gates
from offramp.generation.heads import TokenExits, attach_tokens
from offramp.generation.loop import Generated, Scored, generate, score
from offramp.generation.lossless import Draft, DraftTimes, Verified, choose_draft, generate_lossless
from offramp.generation.promises import Changed, TextResult, certify_texts
from offramp.generation.reference import generate_without_cache
from offramp.generation.rules import TokenPolicy
from offramp.generation.scoring import CaptionScores, MetricDrop, caption_scores
from offramp.generation.searching import search
from offramp.generation.traces import record_tokens, sequences_of

__all__ = [
    "CaptionScores",
    "Changed",
    "Decoder",
    "Draft",
    "DraftTimes",
    "Generated",
    "MetricDrop",
    "Said",
    "Sampling",
    "Scored",
    "TextResult",
    "TokenBundle",
    "TokenExits",
    "TokenPolicy",
    "Verified",
    "attach_tokens",
    "caption_scores",
    "certify_texts",
    "choose_draft",
    "decoder_of",
    "generate",
    "generate_lossless",
    "generate_without_cache",
    "learn_gates",
    "measure_tokens",
    "record_tokens",
    "resnet_encoder",
    "score",
    "search",
    "sequences_of",
    "stop_at",
]
