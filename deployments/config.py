"""Settings of one deployment, read from the `args` of a Serve application and checked in full.

A bad or unknown key raises :class:`~nestedfp.policies.checks.InvalidField` with its dotted name, the value
and the remedy. The file around them is `nestedfp.deployments.serve_file`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from nestedfp.policies import checks, roofline
from nestedfp.policies.autoscaling import ScalingConfig
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.vllm.settings import DATA, LORA, PIPELINE, SPECULATION, Settings, refusal

SIMULATED: Final = "simulated"
SIMULATED_PREFIX: Final = "simulated-"
"""Begins the id of each simulated replica, in headers, metrics and the policy's status alike."""
DEVICES: Final = ("cpu", "cuda", SIMULATED)

# A loop of Serve's own in another thread contends with the engine's for the interpreter: beside vLLM's
# tokenizer and outputs, prompts took half a second longer to the engine under load on a GPU (p90).
REPLICA_ENVIRONMENT: Final = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
CPU_ENVIRONMENT: Final = {
    # Without a size every replica claims a share of all memory, and a second one may not start.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Ray places replicas; vLLM must not bind each of them to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # The CPU worker does not end by itself at shutdown: do not wait long before it is told to.
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
}
SIMULATED_ENVIRONMENT: Final = {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
REQUEST_TIMEOUT_S: Final = 600.0
"""How long an answer may take unless the file says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a replica runs."""

    model: str
    """A Hugging Face id, a folder, or a name known to `nestedfp.models`."""
    served_model_name: str
    """The name clients ask for."""
    device: str = "cuda"
    """`simulated` serves no model: see :class:`SimulatedArguments`."""
    nested: bool = True
    """False serves plain vLLM, without flips: the baseline to compare with."""
    plugin: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the vLLM plugin (`nestedfp.vllm.settings`)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `vllm serve` by name (`max_model_len`, `max_num_seqs`, ...)."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the replica's processes."""

    def __post_init__(self) -> None:
        checks.text("engine.model", self.model)
        checks.text("engine.served_model_name", self.served_model_name)
        checks.one_of("engine.device", self.device, DEVICES)
        checks.flag("engine.nested", self.nested)
        for name in ("plugin", "arguments", "environment"):
            if not isinstance(getattr(self, name), Mapping):
                raise InvalidField(f"engine.{name}", getattr(self, name), "give a mapping")
        self._check_arguments()
        self._check_plugin()
        for name, value in self.environment.items():
            if not isinstance(value, str):
                raise InvalidField(f"engine.environment.{name}", value, "give a string: put it in quotes")

    @property
    def plans(self) -> tuple[str, ...]:
        """Named plans that the engine knows besides `fp16`, `fp8` and `auto`."""
        return tuple(name for name in Settings.from_dict(self.plugin).plans if name not in (FP16, FP8))

    @property
    def gpus(self) -> int:
        """How many GPUs the processes of one engine take."""
        if self.device != "cuda":
            return 0
        return math.prod(self.arguments.get(size, 1) for size in _PARALLEL_SIZES)

    @property
    def max_num_seqs(self) -> int:
        """Most requests of one step."""
        if self.device == SIMULATED:
            return SimulatedArguments.from_dict(self.arguments).max_num_seqs
        given: int | None = self.arguments.get("max_num_seqs")
        return _VLLM_SEQUENCES if given is None else given

    def _check_arguments(self) -> None:
        if self.device == SIMULATED:
            SimulatedArguments.from_dict(self.arguments)
        for name, value in self.arguments.items():
            if name in _OWN_ARGUMENTS:
                raise InvalidField(f"engine.arguments.{name}", value, "set it under engine")
            if name in _SERVER_ARGUMENTS:
                remedy = "remove it: Ray Serve is the HTTP server, and serves the OpenAI routes alone"
                raise InvalidField(f"engine.arguments.{name}", value, remedy)
        # They decide how many GPUs are set aside, so vLLM gets the same whole numbers.
        sizes = {
            name: checks.integer(f"engine.arguments.{name}", self.arguments[name], minimum=1)
            for name in _PARALLEL_SIZES
            if name in self.arguments
        }
        # The policy predicts with the one, what a replica holds follows the other; none is vLLM's default.
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if self.arguments.get(name) is not None:
                sizes[name] = checks.integer(f"engine.arguments.{name}", self.arguments[name], minimum=1)
        object.__setattr__(self, "arguments", {**self.arguments, **sizes})
        if self.nested:
            self._refuse_unsupported()
        overrides = self.arguments.get("hf_overrides", {})
        if self.nested and (not isinstance(overrides, Mapping) or "quantization_config" in overrides):
            remedy = "give a mapping without quantization_config, which engine.plugin makes"
            raise InvalidField("engine.arguments.hf_overrides", overrides, remedy)

    def _refuse_unsupported(self) -> None:
        """The engine would say the same, but only after its replica has a GPU and has loaded vLLM."""
        wanted = {
            LORA: ("enable_lora", bool(self.arguments.get("enable_lora"))),
            SPECULATION: ("speculative_config", self.arguments.get("speculative_config") is not None),
            PIPELINE: ("pipeline_parallel_size", self.arguments.get("pipeline_parallel_size", 1) > 1),
            DATA: ("data_parallel_size", self.arguments.get("data_parallel_size", 1) > 1),
        }
        for feature, (name, given) in wanted.items():
            if given:
                raise InvalidField(f"engine.arguments.{name}", self.arguments[name], refusal(feature))

    def _check_plugin(self) -> None:
        if self.plugin and (self.device == SIMULATED or not self.nested):
            raise InvalidField("engine.plugin", dict(self.plugin), "leave it out: this engine has no plugin")
        try:
            Settings.from_dict(self.plugin)
        except ValueError as error:
            raise InvalidField("engine.plugin", dict(self.plugin), str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedArguments:
    """`engine.arguments` of a simulated engine. Its step times are those of `policy.latency`."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    """Left out, it is the `chunk_tokens` of `policy.latency`, where that is given."""
    max_model_len: int = 32768
    kv_tokens: int = roofline.KV_CAPACITY_TOKENS
    stream_interval: int = 1
    """Tokens in one event of a stream after the first."""
    seed: int = 0
    """Of the noise on step times."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            minimum = 0 if entry.name == "seed" else 1
            checks.take_integer(self, entry.name, place="engine.arguments", minimum=minimum)

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> SimulatedArguments:
        return cls(**checks.mapping("engine.arguments", arguments, _names(cls)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """How many replicas run and how Serve treats them. Durations are seconds."""

    count: int | None = None
    """Number of replicas where autoscaling is off; without it, one."""
    num_cpus: float = 1.0
    num_gpus: float | None = None
    """GPUs of a replica; without it, as many as its engine's processes take."""
    max_ongoing_requests: int | None = None
    """Requests a replica holds at once, its queue included; without it, `max_num_seqs` and a quarter.
    No fewer than `max_num_seqs`: what waits in Serve's proxies is hidden from the policy.
    """
    max_queued_requests: int = 128
    """Requests that wait in one proxy for a replica; beyond it the answer is 503 with Retry-After."""
    health_check_period_s: float = 2.0
    health_check_timeout_s: float = 10.0
    graceful_shutdown_timeout_s: float = REQUEST_TIMEOUT_S
    """How long a replica that must go may finish its requests; a file's `request_timeout_s` or more."""
    start_attempts: int = 2
    """Failed starts after which the application is given up."""
    signal_window_s: float = 10.0
    """Window of the TTFT and TPOT percentiles and of the arrival rate."""

    def __post_init__(self) -> None:
        for name in ("count", "max_ongoing_requests", "max_queued_requests", "start_attempts"):
            if getattr(self, name) is not None:
                checks.take_integer(self, name, place="replicas", minimum=1)
        checks.number("replicas.num_cpus", self.num_cpus)
        if self.num_gpus is not None:
            checks.number("replicas.num_gpus", self.num_gpus)
        for name in (
            "health_check_period_s",
            "health_check_timeout_s",
            "graceful_shutdown_timeout_s",
            "signal_window_s",
        ):
            checks.number(f"replicas.{name}", getattr(self, name), above=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """The door."""

    max_body_bytes: int = 4 * 2**20
    retry_after_s: int = 1
    """What a client is told to wait after 429 and 503."""
    api_keys_variable: str = "NESTEDFP_API_KEYS"
    """Environment variable of the replicas that holds the accepted keys, separated by commas; empty: no keys.
    """
    max_strict_requests: int = 8
    """Most requests with `x-nestedfp-precision: fp16` that a replica holds at once; they keep its steps in 16
    bits.
    """
    strict_wait_s: float | None = None
    """How long one more of them waits for a place before it is refused; without it, half the TTFT objective:
    one that waited for all of it would be let in only to miss it, as queue and prefill are still to come.
    """

    events_per_second: int = 500
    """Messages a second of a replica's streams, all together, beside each one's first two and last. With more
    to say they join events.
    """

    def __post_init__(self) -> None:
        checks.take_integer(self, "max_body_bytes", place="http", minimum=1024)
        checks.take_integer(self, "events_per_second", place="http", minimum=1)
        checks.take_integer(self, "retry_after_s", place="http", minimum=1)
        checks.take_integer(self, "max_strict_requests", place="http")
        checks.text("http.api_keys_variable", self.api_keys_variable)
        if self.strict_wait_s is not None:
            checks.number("http.strict_wait_s", self.strict_wait_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingSettings:
    """Bounds of the number of replicas, and the rule that chooses it. Durations are seconds."""

    min_replicas: int
    """Also the number at the first start; a later deployment keeps the number that runs."""
    max_replicas: int
    interval_s: float = 1.0
    """How often replicas publish their facts."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """The other settings of :class:`~nestedfp.policies.autoscaling.ScalingConfig`. It has its own delays
    (`overload_s`, `fp8_patience_s`, `spare_s`); Serve adds none.
    """

    def __post_init__(self) -> None:
        checks.number("autoscaling.interval_s", self.interval_s, above=0.0)
        rule = checks.mapping("autoscaling.rule", self.rule, _RULE_SETTINGS)
        try:
            ScalingConfig(min_replicas=self.min_replicas, max_replicas=self.max_replicas, **rule)
        except InvalidField as error:
            place = "autoscaling.rule" if error.field in _RULE_SETTINGS else "autoscaling"
            raise InvalidField(f"{place}.{error.field}", error.value, error.remedy) from None
        for name in ("min_replicas", "max_replicas"):
            checks.take_integer(self, name, place="autoscaling", minimum=1)

    @property
    def scaling(self) -> dict[str, Any]:
        """The arguments of the rule's :class:`~nestedfp.policies.autoscaling.ScalingConfig`."""
        return {"min_replicas": self.min_replicas, "max_replicas": self.max_replicas, **self.rule}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSettings:
    """All settings of one application."""

    engine: EngineSettings
    replicas: ReplicaSettings = ReplicaSettings()
    http: HttpSettings = HttpSettings()
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    autoscaling: AutoscalingSettings | None = None

    def __post_init__(self) -> None:
        if self.autoscaling is not None and not self.engine.nested:
            remedy = "leave it out: the rule scales replicas that can change their precision"
            raise InvalidField("autoscaling", "settings", f"{remedy} (engine.nested is false)")
        if self.autoscaling is not None and self.replicas.count is not None:
            remedy = "leave it out: autoscaling begins with its min_replicas and goes on by itself"
            raise InvalidField("replicas.count", self.replicas.count, remedy)
        held, batch = self.replicas.max_ongoing_requests, self.engine.max_num_seqs
        if held is not None and held < batch:
            remedy = (
                f"give at least engine.arguments.max_num_seqs, {batch}, or lower that: else requests wait in "
                "Serve's proxies, where the policy does not see them"
            )
            raise InvalidField("replicas.max_ongoing_requests", held, remedy)
        unknown = [plan for plan in self.policy.plans if plan not in self.engine.plans]
        if unknown:
            raise InvalidField("policy.plans", unknown, "configure these plans under engine.plugin.plans")
        # A single process may share its GPU with other replicas.
        needed, given = self.engine.gpus, self.num_gpus
        if needed and not (given >= needed or (needed == 1 and given > 0)):
            remedy = f"give {needed}, or leave it out: so many take the engine's processes"
            raise InvalidField("replicas.num_gpus", given, remedy)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests a replica holds at once; unless set, somewhat more than one of its steps."""
        given = self.replicas.max_ongoing_requests
        return math.ceil(_ROOM_TO_QUEUE * self.engine.max_num_seqs) if given is None else given

    @property
    def num_gpus(self) -> float:
        """GPUs that Ray sets aside for a replica."""
        return self.engine.gpus if self.replicas.num_gpus is None else self.replicas.num_gpus

    @property
    def replicas_at_start(self) -> int:
        """How many replicas run before anything scales them."""
        if self.autoscaling is not None:
            return self.autoscaling.min_replicas
        return 1 if self.replicas.count is None else self.replicas.count

    @property
    def assumes_step_costs(self) -> bool:
        """Whether step times of a GPU are predicted with costs that nobody gave for it."""
        unknown = roofline.described(self.policy.latency) == roofline.NAME
        return (
            self.engine.device == "cuda" and unknown and _predicts(self.policy, self.autoscaling is not None)
        )

    @property
    def strict_wait_s(self) -> float:
        """How long a request that demands 16 bits waits for a place."""
        given = self.http.strict_wait_s
        return _STRICT_WAIT_SHARE * self.policy.slo.ttft_s if given is None else given

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> DeploymentSettings:
        """Read and check the settings; anything left out keeps its default."""
        blocks = checks.mapping("", settings, [block.name for block in dataclasses.fields(cls)])
        if "engine" not in blocks:
            raise InvalidField("engine", None, "give at least engine.model")
        engine = dict(checks.mapping("engine", blocks["engine"], _names(EngineSettings)))
        if "model" not in engine:
            raise InvalidField("engine.model", None, "give a Hugging Face id or a folder")
        engine.setdefault("served_model_name", Path(str(engine["model"])).name)
        autoscaling = blocks.get("autoscaling")
        checked = _block("engine", EngineSettings, engine)
        return cls(
            engine=checked,
            replicas=_block("replicas", ReplicaSettings, blocks.get("replicas", {})),
            http=_block("http", HttpSettings, blocks.get("http", {})),
            policy=_policy(blocks.get("policy", {}), checked, scaled=autoscaling is not None),
            autoscaling=None
            if autoscaling is None
            else _block("autoscaling", AutoscalingSettings, autoscaling),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; `from_dict` reads them back."""
        return {
            "engine": _plain(self.engine),
            "replicas": _plain(self.replicas),
            "http": _plain(self.http),
            "policy": self.policy.to_dict(),
            "autoscaling": None if self.autoscaling is None else _plain(self.autoscaling),
        }

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a replica; those of the settings win over the defaults."""
        defaults = {"cpu": CPU_ENVIRONMENT, SIMULATED: SIMULATED_ENVIRONMENT}.get(self.engine.device, {})
        return {**REPLICA_ENVIRONMENT, **defaults, **self.engine.environment}


_VLLM_SEQUENCES: Final = 128
"""vLLM's `max_num_seqs` unless told otherwise, where it is started as a library."""
_ROOM_TO_QUEUE: Final = 1.25
_STRICT_WAIT_SHARE: Final = 0.5
"""Of the TTFT objective."""
_PARALLEL_SIZES: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_OWN_ARGUMENTS: Final = (
    "model",
    "served_model_name",
    "quantization",
    "scheduler_cls",
    "worker_cls",
    "api_key",
)
_SERVER_ARGUMENTS: Final = (
    "allow_credentials",
    "allowed_headers",
    "allowed_methods",
    "allowed_origins",
    "api_server_count",
    "config",
    "disable_fastapi_docs",
    "disable_uvicorn_access_log",
    "enable_offline_docs",
    "enable_server_load_tracking",
    "enable_ssl_refresh",
    "enable_tokenizer_info_endpoint",
    "grpc",
    "grpc_port",
    "h11_max_header_count",
    "h11_max_incomplete_event_size",
    "headless",
    "host",
    "model_tag",
    "port",
    "root_path",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_ciphers",
    "ssl_keyfile",
    "uds",
    "uvicorn_log_level",
)
"""What `vllm serve` takes for its HTTP server, and for requests that the door does not let in."""

_RULE_SETTINGS: Final = [
    entry.name
    for entry in dataclasses.fields(ScalingConfig)
    if entry.name not in ("min_replicas", "max_replicas")
]

_Block = TypeVar("_Block")


def _names(block: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(block)]


def _block(name: str, block: type[_Block], given: object) -> _Block:
    values = checks.mapping(name, given, _names(block))
    for entry in dataclasses.fields(block):  # type: ignore[arg-type]
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in values:
            raise InvalidField(f"{name}.{entry.name}", None, "give it: it has no default")
    return block(**values)


def _plain(block: Any) -> dict[str, Any]:
    values = {name: getattr(block, name) for name in _names(type(block))}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _policy(given: object, engine: EngineSettings, *, scaled: bool) -> PolicyConfig:
    """The policy. Where the engine's longest step is given, it is what the policy predicts with."""
    if not isinstance(given, Mapping):
        raise InvalidField("policy", given, "give a mapping with the settings of the policy")
    longest: int | None = engine.arguments.get("max_num_batched_tokens")
    latency = given.get("latency")
    if longest is not None and isinstance(latency, Mapping):
        given = {**given, "latency": {"chunk_tokens": longest, **latency}}
    with checks.within("policy"):
        policy = PolicyConfig.from_dict(given)
    if longest is None:
        return policy
    if policy.latency is not None and policy.latency.chunk_tokens != longest:
        remedy = (
            f"leave it out, or give {longest} as engine.arguments.max_num_batched_tokens is: they are one"
        )
        raise InvalidField("policy.latency.chunk_tokens", policy.latency.chunk_tokens, remedy)
    if policy.latency is None and _predicts(policy, scaled):
        return dataclasses.replace(policy, latency=roofline.latency_model(longest))
    return policy


def _predicts(policy: PolicyConfig, scaled: bool) -> bool:
    """Whether anything predicts step times."""
    return scaled or policy.cut_steps or policy.controller == "predictive"
