"""vLLM's worker, with the plan set before each step and reported after it."""

import copy
import logging
import time
from dataclasses import replace
from typing import Any
from zlib import crc32

from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE, LayerRecord
from nestedfp.vllm.config import settings_of
from nestedfp.vllm.gated import fuse_silu
from nestedfp.vllm.linear import STAGING
from nestedfp.vllm.plan import Plan
from nestedfp.vllm.settings import (
    BATCH_INVARIANCE,
    DATA,
    ENCODER_GRAPHS,
    LORA,
    PIPELINE,
    SPECULATION,
    refusal,
)
from nestedfp.vllm.step import REPORT, TAG, StepReport, StepTag

# Under vLLM's own logger, which is the only one that its processes configure.
logger = logging.getLogger("vllm.nestedfp")

_AsyncModelRunnerOutput: Any = compat.async_model_runner_output()


class PrecisionMixin:
    """Flips before a step whose tag asks for another plan; the only writer of `ACTIVE.plan`."""

    vllm_config: Any
    model_runner: Any
    device: Any
    staging_bytes = 0
    """What nesting took beside the weights while they loaded."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.precision_settings = settings_of(vllm_config)
        refuse_unsupported(vllm_config)
        compat.warn_of_untried(compat.installed_version())
        ACTIVE.clear()
        self._report: StepReport | None = None
        self._checked_steps = self._mixed_steps = self._checksum = 0
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self.precision_settings.fuse_silu:
            fuse_silu(self.model_runner.get_model())
        self.staging_bytes = STAGING.release()
        # vLLM's compile cache knows the configuration, not which layers were nested and gated: tell it, or
        # code compiled for another mix of layers would be taken.
        states = {"layers": sorted(ACTIVE.layers.items()), "mlps": sorted(ACTIVE.mlps.items())}
        self.vllm_config.additional_config = {**self.vllm_config.additional_config, "nestedfp": states}
        if self.precision_settings.check_steps or self.device.type == "cpu":
            ACTIVE.start_recording(self.device)
        counts, reasons = ACTIVE.layer_counts()
        logger.info("nestedfp: %(nested)d linear layers nested, %(plain)d plain", counts)
        for reason, count in reasons.items():
            logger.info("nestedfp: %d layers plain: %s", count, reason)
        fused, reasons = ACTIVE.mlp_counts()
        logger.info("nestedfp: %d MLPs fused, %d not", fused, sum(reasons.values()))
        for reason, count in reasons.items():
            logger.info("nestedfp: %d MLPs not fused: %s", count, reason)
        if ACTIVE.inexact_rows:
            logger.info("nestedfp: %d layers nested to nearest", len(ACTIVE.inexact_rows))

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().reload_weights(*args, **kwargs)  # type: ignore[misc]
        finally:
            STAGING.release()

    def finish_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """Ends what `start_weight_update` began: weights that were sent, not read."""
        try:
            super().finish_weight_update(*args, **kwargs)  # type: ignore[misc]
        finally:
            STAGING.release()

    def execute_model(self, scheduler_output: Any) -> Any:
        tag: StepTag | None = getattr(scheduler_output, TAG, None)
        if tag is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        plan = self.precision_settings.plans[tag.plan]
        flip_seconds = None
        if plan != ACTIVE.plan:
            start = time.perf_counter()
            self.flip(plan)
            flip_seconds = time.perf_counter() - start
        self._report = StepReport(plan.name, flip_seconds, None, ACTIVE.loads)
        return self._with_report(super().execute_model(scheduler_output))  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def flip(self, plan: Plan) -> None:
        """Puts `plan` in force for the next step."""
        ACTIVE.plan = plan

    def precision_facts(self) -> dict[str, Any]:
        """What only the worker knows, for the engine's status, and as of how many `loads`."""
        layers, plain_reasons = ACTIVE.layer_counts()
        fused, unfused_reasons = ACTIVE.mlp_counts()
        return {
            "layers": layers,
            "plain_reasons": plain_reasons,
            "fused_mlps": fused,
            "unfused_reasons": unfused_reasons,
            "inexact_rows": sum(ACTIVE.inexact_rows.values()),
            "loads": ACTIVE.loads,
        }

    def checked_steps(self) -> dict[str, int]:
        """Of this rank, where steps are checked: their number, those with layers that ran something else than
        the plan, and a checksum over what every layer ran in each. Ranks that ran alike answer alike."""
        return {"steps": self._checked_steps, "mixed": self._mixed_steps, "checksum": self._checksum}

    def _check(self, record: LayerRecord) -> int:
        """Layers of the step that has just run that did not run what its plan says."""
        marks = record.take()
        mismatches = record.mismatches(marks, ACTIVE.plan)
        if mismatches:
            logger.error("nestedfp: %d layers did not run plan %s", mismatches, ACTIVE.plan.name)
        self._checked_steps += 1
        self._mixed_steps += mismatches > 0
        self._checksum = crc32(marks, self._checksum)
        return mismatches

    def _with_report(self, output: Any) -> Any:
        """`output` with the step's report; None, which means that sampling is still to come, stays."""
        if output is None or self._report is None:
            return output
        report, self._report = self._report, None
        if ACTIVE.record is not None:
            report = replace(report, mismatches=self._check(ACTIVE.record))
        if isinstance(output, _AsyncModelRunnerOutput):
            return ReportedOutput(output, report)
        return attach(output, report)


class ReportedOutput(_AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is still on the device, and the report to attach once it has arrived."""

    def __init__(self, pending: Any, report: StepReport) -> None:
        self._pending = pending
        self._report = report

    def get_output(self) -> Any:
        return attach(self._pending.get_output(), self._report)


def attach(output: Any, report: StepReport) -> Any:
    # vLLM shares one constant among all empty outputs: never write to what was handed over.
    reported = copy.copy(output)
    setattr(reported, REPORT, report)
    return reported


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises ValueError for what this plugin does not do, saying what to do instead."""
    parallel = vllm_config.parallel_config
    wanted = {
        LORA: vllm_config.lora_config is not None,
        SPECULATION: vllm_config.speculative_config is not None,
        PIPELINE: parallel.pipeline_parallel_size > 1,
        # Of a dense model vLLM makes each rank an engine of size 1; all but the first keep their index.
        DATA: parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0,
        BATCH_INVARIANCE: compat.batch_invariant(),
        # Their manager holds one family, and would keep the precision that was captured last.
        ENCODER_GRAPHS: vllm_config.compilation_config.cudagraph_mm_encoder,
    }
    for feature, given in wanted.items():
        if given:
            raise ValueError(refusal(feature))
