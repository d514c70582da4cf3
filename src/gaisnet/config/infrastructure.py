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
        description="Activations of requests, both ways. Only with float32 does a split int8 model give the same "
        "answer as the unsplit one, token for token; float16 halves the bytes.",
    )
    body_output: TensorCode = Field(
        "int4",
        description="Activations of examples, edge or cloud -> device; for an encoder these are logits. With fewer "
        "than 32 classes, logits are sent in float32 where this says int4; with more, the default is "
        "float16 and int4 is refused.",
    )
    gradient: TensorCode = Field(
        "int4",
        description="Gradients, device -> edge, and in the last mile on to the cloud; gradients of logits follow the "
        "rule of body_output.",
    )
    gradient_rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="Rounding of int8 and int4 gradients. Stochastic rounding makes larger errors, but they cancel "
        "out over many steps.",
    )
    anchor: TensorCode = Field(
        "float16",
        description="The FM's output on its own text, sent once: cloud -> edge -> local device. Forgetting is "
        "measured against it, so it should stay precise.",
    )
    adapter: TensorCode = Field("float32", description="Adapters, both ways.")
    max_message_bytes: int = Field(
        2**31,
        ge=2**16,
        description="Longest frame; a longer one is refused before it is read. A message that does not fit crosses in "
        "chunks, as does every message above 64 MiB.",
    )
    max_transfer_bytes: int = Field(
        2**36,
        ge=2**16,
        description="Longest message, in chunks or not; a longer one is refused. Before the model is loaded, the "
        "messages that a run must send are checked against it.",
    )

    def rounding(self, setting: str) -> Literal["nearest", "stochastic"]:
        """Return how tensors of ``setting`` are rounded, if they are."""
        return self.gradient_rounding if setting == "gradient" else "nearest"


class FaultSettings(Settings):
    """Timeouts, and the parties that a round or a cycle needs."""

    step_deadline_s: float = Field(
        60.0, gt=0.0, description="Time for a device to answer a training step; a device that takes longer is left out."
    )
    round_deadline_s: float = Field(
        1800.0,
        gt=0.0,
        description="Time for a device to send its head's output, to install its part, or to finish local learning.",
    )
    away_s: float = Field(
        60.0,
        ge=0.0,
        description="Time to wait for a device whose link is down, and for an edge that missed the previous cycle.",
    )
    min_devices: int = Field(
        1, ge=1, description="Fewest devices of an edge that an edge round needs; with fewer, the round fails."
    )
    edge_deadline_s: float = Field(
        7200.0, gt=0.0, description="Time for the cloud to wait for an edge, restarts included."
    )
    min_edges: int = Field(
        1,
        ge=1,
        description="Fewest edges that a cycle needs; with fewer, the cycle fails. Otherwise the cycle goes on "
        "without an edge that is away, fails or sends an impossible value, and asks that edge again in "
        "the next cycle.",
    )
    max_example_ratio: float = Field(
        20.0,
        ge=1.0,
        description="Most examples that a device may report, as a multiple of the median of the edge's other devices. "
        "A device that reports more is left out, because it would outweigh all others. A device with "
        "built-in data may hold the whole data set.",
    )


class ServiceSettings(Settings):
    """Capacity of a body's service, and the share of training beside it."""

    max_cache_mib: int = Field(
        1024, ge=1, description="Memory for the keys and values of all sessions; beyond it, a new session is refused."
    )
    max_sessions: int = Field(64, ge=1, description="Sessions that may be open at once.")
    max_share_per_peer: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="Share of the sessions and of their memory that one peer may hold: a device at its edge, an edge "
        "at the cloud. If a site has a single peer, that peer may hold all of it.",
    )
    max_request_mib: int = Field(
        64,
        ge=1,
        description="Memory for requests of one device that its edge has not answered yet.",
    )
    chunk: int = Field(64, ge=1, description="Most positions of one session in a step; longer prompts are split.")
    step_rows: int = Field(256, ge=1, description="Most positions of all sessions together in a step.")
    max_activations_mib: int | None = Field(
        None,
        ge=0,
        description="Memory of an edge for the activations that it trains on; the rest goes to files in the folder "
        "named by TMPDIR, which should be on a disk. null keeps all of them in memory.",
    )
    fine_tune_share: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Share of a machine's cores that fine-tuning gets while requests are being answered; the two "
        "compute at the same time. On a single core it is the share of time.",
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
        "auto",
        description="Policy of a device: 'auto' escalates where the DM is unsure, 'always' from the first token, "
        "'never' not at all.",
    )
    threshold: float | None = Field(
        None,
        description="Least probability of the DM's likeliest token; below it the FM writes the rest. null takes the "
        "calibrated threshold.",
    )
    escalate_to: Literal["merged", "domain"] = Field(
        "merged",
        description="Adapter on the FM after escalation: 'merged' from all domains, or that of the DM's own 'domain'. "
        "In a network of one domain both are the same.",
    )
    other_domains: float = Field(
        0.2,
        ge=0.0,
        le=0.5,
        description="Expected share of requests that belong to other domains. The threshold is calibrated on such a "
        "mix, as far as this process has test examples of other domains.",
    )
    most_escalated: float = Field(
        0.3, ge=0.0, le=1.0, description="Largest share of the answers that may be escalated, for the calibration."
    )


class FrontSettings(Settings):
    """The HTTP endpoint: limits on requests and times, and allowed web pages."""

    max_body_bytes: int = Field(2**20, ge=2**10, description="Longest request body; a longer one is refused with 413.")
    max_prompt_tokens: int = Field(4096, ge=1, description="Longest prompt; a longer one is refused with 400.")
    max_answer_tokens: int = Field(
        1024, ge=1, description="Longest answer that a request may ask for; more is refused with 400."
    )
    max_messages: int = Field(
        4096, ge=1, description="Most messages in a chat, and most content parts in all of them; more are refused."
    )
    max_prompts: int = Field(32, ge=1, description="Most prompts in one request for completions; more are refused.")
    default_chat_tokens: int = Field(
        512,
        ge=1,
        description="Longest answer to a chat request that names no limit. For completions that is 16 tokens, as in "
        "OpenAI's API.",
    )
    max_answers: int = Field(
        32,
        ge=1,
        description="Answers that may be written at once; a further request is refused with 429. If a request with "
        "several prompts exceeds the limit, the remaining prompts wait for its first one.",
    )
    max_connections: int = Field(
        256,
        ge=1,
        description="Connections that may be open at once. A further one closes the connection that has owed a "
        "request for the longest time.",
    )
    head_timeout_s: float = Field(
        10.0, gt=0.0, description="Time from the first byte of a request to the end of its headers."
    )
    body_timeout_s: float = Field(30.0, gt=0.0, description="Time from the end of the headers to the end of the body.")
    idle_timeout_s: int = Field(5, ge=1, description="Time that a connection may be idle between two requests.")
    send_timeout_s: float = Field(60.0, gt=0.0, description="Time that a client may read nothing of its answer.")
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins of web pages whose scripts may send requests, such as https://chat.example; '*' allows "
        "all. Requests from other pages are refused.",
    )


class CloudSettings(Settings):
    """Addresses of the cloud's site; used by ``gaisnet deploy`` only."""

    host: Host = Field("localhost", description="DNS name or IPv4 address at which edges reach the cloud.")
    nvflare_port: int = Field(0, ge=0, le=65535, description="TCP port of NVFlare's server; 0 takes a free one.")
    link_port: int = Field(0, ge=0, le=65535, description="TCP port for the links of the edges; 0 takes a free one.")

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
