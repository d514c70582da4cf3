"""Settings of links, faults, services and the HTTP endpoint: how a network runs, not how it trains."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from gaisnet.config.hosts import Host, is_ipv6
from gaisnet.config.learning import Settings

TensorCode = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[A-Za-z0-9.\[\]:-]+)$", max_length=300)]


class WireSettings(Settings):
    """Code of tensors on a link: int8 and int4 with scales (``gaisnet.row_quant``), others as plain casts."""

    smashed: TensorCode = Field("int4", description="Activations of examples, device -> edge -> cloud.")
    session: TensorCode = Field(
        "float32",
        description="Activations of answers, both ways. Only in float32 is an answer of an int8 model that of the "
        "model in one piece, token for token; float16 halves the bytes.",
    )
    body_output: TensorCode = Field(
        "int4",
        description="Activations of examples, edge or cloud -> device; of an encoder logits. Those of fewer than 32 "
        "classes are in float32 where this says int4; with more, float16 is the default and int4 is refused.",
    )
    gradient: TensorCode = Field(
        "int4", description="Gradients device -> edge, and in the last mile on to the cloud; of logits as there."
    )
    gradient_rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="How int8 and int4 gradients are rounded; by chance, errors are larger but cancel out."
    )
    anchor: TensorCode = Field(
        "float16",
        description="What the FM makes of its own text, cloud -> edge -> local device, once: what is not to be lost.",
    )
    adapter: TensorCode = Field("float32", description="Adapters, both ways.")
    max_message_bytes: int = Field(
        2**31,
        ge=2**16,
        description="Longer frames are refused before they are read; longer messages cross in chunks that fit. All "
        "that are longer than 64 MiB do, whatever this says.",
    )
    max_transfer_bytes: int = Field(
        2**36,
        ge=2**16,
        description="Longer messages are refused, in chunks or not. What a run is known to send is held against it "
        "before the model is loaded.",
    )

    def rounding(self, setting: str) -> Literal["nearest", "stochastic"]:
        """Return how tensors of ``setting`` are rounded, if they are."""
        return self.gradient_rounding if setting == "gradient" else "nearest"


class FaultSettings(Settings):
    """Timeouts, and the parties that a round or a cycle needs."""

    step_deadline_s: float = Field(60.0, gt=0.0, description="A device that answers a training step later is left out.")
    round_deadline_s: float = Field(
        1800.0, gt=0.0, description="Same for its head's output, an installation, local learning."
    )
    away_s: float = Field(
        60.0,
        ge=0.0,
        description="How long a device whose link is down is waited for, and an edge that missed the cycle before.",
    )
    min_devices: int = Field(1, ge=1, description="An edge round with fewer devices of an edge fails.")
    edge_deadline_s: float = Field(
        7200.0, gt=0.0, description="How long the cloud waits for an edge, restarts included."
    )
    min_edges: int = Field(
        1,
        ge=1,
        description="A cycle with fewer edges fails. With enough of them it goes on without an edge that is away, "
        "fails or sends what cannot be meant; that one is asked again in the next cycle.",
    )
    max_example_ratio: float = Field(
        20.0,
        ge=1.0,
        description="Examples that one device may say it has, as a multiple of the median of its edge's other devices; "
        "one that says more is left out, for it would outweigh all others. Of built-in data a device may have all.",
    )


class ServiceSettings(Settings):
    """Capacity of a body's service, and the share of training beside it."""

    max_cache_mib: int = Field(
        1024, ge=1, description="Of keys and values of all sessions; above it a session is refused."
    )
    max_sessions: int = Field(64, ge=1, description="Open at once.")
    max_share_per_peer: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="The share of these sessions and of their memory that one peer may hold at once: a device at its "
        "edge, an edge at the cloud. The only peer of a site may hold all of it.",
    )
    max_request_mib: int = Field(
        64,
        ge=1,
        description="Limit on a device's requests that its edge has not answered: rows of the answers it writes.",
    )
    chunk: int = Field(64, ge=1, description="Positions of one session that a step takes at most; splits long prompts.")
    step_rows: int = Field(256, ge=1, description="Positions of all sessions that a step takes at most.")
    max_activations_mib: int | None = Field(
        None,
        ge=0,
        description="Of its devices' activations, what an edge keeps in memory to learn from; the rest is in files of "
        "the folder that TMPDIR names, which should be on a disk. null keeps all in memory.",
    )
    fine_tune_share: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Of a machine's cores, what learning gets while there are answers; both compute at the same time. "
        "On a single core: of its time, where answers would take it all.",
    )

    def share_of_one(self, num_peers: int) -> float:
        """Return the share of a site's sessions, and of their memory, that one of its peers may use."""
        return self.max_share_per_peer if num_peers > 1 else 1.0

    @property
    def max_sessions_per_peer(self) -> int:
        """Return the number of sessions of one of several peers."""
        return max(1, int(self.max_share_per_peer * self.max_sessions))


class RoutingSettings(Settings):
    """Escalation of a domain model's answer to the foundation model."""

    escalate: Literal["never", "auto", "always"] = Field(
        "auto", description="A device's policy: 'auto' escalates where the DM is not sure, 'always' at the first token."
    )
    threshold: float | None = Field(
        None, description="A token that the DM is less sure of is the FM's to write; null takes the calibrated one."
    )
    escalate_to: Literal["merged", "domain"] = Field(
        "merged",
        description="What acts on the FM then: the adapter merged from all domains, or that of the DM's domain alone. "
        "Where there is one domain only, its own.",
    )
    other_domains: float = Field(
        0.2,
        ge=0.0,
        le=0.5,
        description="Share of the requests that are expected to belong to other domains; a threshold is calibrated on "
        "such a mix, as far as this process has held-out examples of them.",
    )
    most_escalated: float = Field(0.3, ge=0.0, le=1.0, description="Share of the answers that may be escalated.")


class FrontSettings(Settings):
    """The HTTP endpoint: limits on requests and times, and allowed web pages."""

    max_body_bytes: int = Field(2**20, ge=2**10, description="A larger request is refused with 413.")
    max_prompt_tokens: int = Field(4096, ge=1, description="A longer prompt is refused with 400.")
    max_answer_tokens: int = Field(1024, ge=1, description="An answer that asks for more is refused with 400.")
    max_messages: int = Field(4096, ge=1, description="Messages of a chat, and parts of them; more are refused.")
    max_prompts: int = Field(32, ge=1, description="Prompts of one request for completions; more are refused.")
    default_chat_tokens: int = Field(
        512, ge=1, description="Tokens of a chat's answer that names no number; completions take 16, as OpenAI's do."
    )
    max_answers: int = Field(
        32,
        ge=1,
        description="Answers under way at once; one more is refused with 429, except that of several prompts of one "
        "request those without room wait for the first of them.",
    )
    max_connections: int = Field(
        256, ge=1, description="Open at once. One more ends the one that has owed a request for the longest time."
    )
    head_timeout_s: float = Field(
        10.0, gt=0.0, description="Limit from the first byte of a request to its last header."
    )
    body_timeout_s: float = Field(30.0, gt=0.0, description="Limit from there to the end of its body.")
    idle_timeout_s: int = Field(5, ge=1, description="How long a connection may be silent between two requests.")
    send_timeout_s: float = Field(60.0, gt=0.0, description="How long a caller may take nothing of an answer.")
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins of web pages whose scripts may ask, such as https://chat.example; '*' for all. Requests "
        "of other pages are refused.",
    )


class CloudSettings(Settings):
    """Addresses of the cloud's site; used by ``gaisnet deploy`` only."""

    host: Host = Field("localhost", description="DNS name or IPv4 address by which edges reach it.")
    nvflare_port: int = Field(0, ge=0, le=65535, description="TCP port of NVFlare's server; 0 takes a free one.")
    link_port: int = Field(0, ge=0, le=65535, description="TCP port for the edges' own streams; 0 takes a free one.")

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if is_ipv6(host):
            raise ValueError(f"'{host}' is an IPv6 address, to which NVFlare cannot connect; write a DNS name or IPv4")
        if "_" in host or host.endswith("."):
            raise ValueError(
                f"'{host}' is a name that NVFlare refuses; write one of letters, digits, '-' and '.' between"
            )
        return host
