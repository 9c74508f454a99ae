"""Compiles a graph and a batch size to the programs of a training step (docs/training.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from golden.controller import Targets
from golden.fgmp import POLICIES, Policy
from lnpu.compiler import layers
from lnpu.compiler.convolution import (
    Convolution,
    Rounding,
    lower_forward,
    lower_input_grad,
    lower_weight_grad,
    masks_outputs,
)
from lnpu.compiler.graph import (
    Conv,
    ConvStage,
    GlobalAveragePool,
    Graph,
    GroupStage,
    Linear,
    LinearStage,
    MaxPool,
    PoolStage,
    fuse,
    norms_of_errors,
    shared_errors,
)
from lnpu.compiler.layers import ErrorSums, NormTensors, Optimiser, Workspace
from lnpu.compiler.program import Program
from lnpu.compiler.tensor import MemoryMap, RawTensor, Tensor
from lnpu.compiler.tiles import STATISTICS, Tile
from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Opcode, VectorOp
from lnpu.formats import TensorKind

__all__ = ["Formats", "Operation", "TrainingStep", "VectorParameter", "WeightParameter"]

MARK_BYTES = 512
"""Room for the counters that a mark writes."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """FGMP policy of each kind of tensor."""

    activation: Policy = POLICIES["fp16"]
    preactivation: Policy = POLICIES["fp16"]
    error: Policy = POLICIES["fp16"]
    weight: Policy = POLICIES["fp16"]
    gradient: Policy = POLICIES["fp16"]
    momentum: Policy | None = None
    """Of the momenta of weights; None: they stay FP32."""


@dataclass(frozen=True)
class WeightParameter:
    """A trained weight: FP32 master copy, momentum (FP32 or encoded), encoded gradient and copy."""

    name: str
    master: RawTensor
    momentum: RawTensor | Tensor
    gradient: Tensor
    weight: Tensor


@dataclass(frozen=True)
class VectorParameter:
    """A trained per-channel vector: value, momentum and gradient, all FP32."""

    name: str
    master: RawTensor
    momentum: RawTensor
    gradient: RawTensor


@dataclass
class Operation:
    """What a stretch of a program up to its mark does, for reports: the tensors it writes."""

    layer: str
    phase: str
    macs_dense: int
    outputs: list[str] = field(default_factory=list)


class TrainingStep:
    """Memory map and programs of a training step.

    Parameters
    ----------
    config : ChipConfig
    graph : Graph
        Its last node must be linear.
    batch : int
        Images in a step.
    formats : Formats
    optimiser : Optimiser
    eps, norm_momentum : float
        Of batch norm.
    memory : int
        Bytes of external memory.
    targets : mapping of str to Targets
        Kinds of tensors (fields of `Formats`) whose policies the chip adjusts, and what it steers to; `formats` is what
        they start from. What the host encodes (images, error of the logits) stays static.

    Attributes
    ----------
    tensors : dict of str to Tensor or RawTensor
        Everything in memory. Outputs have their node's name; "d.NAME" is the error of NAME, "g.NAME" a weight gradient,
        "w.NAME" weights.
    weights : dict of str to WeightParameter
        By name of the convolution or linear node.
    vectors : dict of str to VectorParameter
        "BN.gamma", "BN.beta" and "FC.bias".
    initial, forward, backward, update, inference : Program
        Each ends with END. `initial` sets the FGMP states of dynamic tensors, once. The host computes the loss gradient
        between `forward` and `backward`.
    """

    def __init__(
        self,
        config: ChipConfig,
        graph: Graph,
        *,
        batch: int,
        formats: Formats,
        optimiser: Optimiser,
        eps: float = 1e-5,
        norm_momentum: float = 0.1,
        memory: int = 256 << 20,
        targets: Mapping[str, Targets] | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch!r}")
        if not graph.nodes or not isinstance(graph.nodes[-1], Linear):
            raise ValueError("the last node of a network must be linear")
        self.config, self.graph, self.batch = config, graph, batch
        self.formats, self.optimiser = formats, optimiser
        self.eps, self.norm_momentum = eps, norm_momentum
        self.stages = fuse(graph)
        self._norms_of_errors = norms_of_errors(self.stages)
        self.map = MemoryMap(size=memory, config=config)
        self.tensors: dict[str, Tensor | RawTensor] = {}
        self.weights: dict[str, WeightParameter] = {}
        self.vectors: dict[str, VectorParameter] = {}
        self.norms: dict[str, NormTensors] = {}
        self.relu = {stage.name for stage in self.stages if isinstance(stage, GroupStage) and stage.relu}
        self._operations: dict[int, list[Operation]] = {}
        self.targets = dict(targets or {})
        # Momenta are stored beside weights, and the chip takes statistics of one tensor at a time.
        if unknown := set(self.targets) - ({part.name for part in fields(Formats)} - {"momentum"}):
            raise ValueError(f"targets must be of kinds of Formats, not {', '.join(sorted(unknown))}")
        self.dynamic: list[tuple[Tensor, Targets]] = []
        self.records: dict[str, int] = {}
        self._place()
        self.forward = self._compile(self._forward)
        self.inference = self._compile(self._inference)
        self.backward = self._compile(self._backward)
        self.update = self._compile(self._update)
        self.initial = self._compile(self._initial)  # last: now all dynamic tensors are known

    def operations(self, program: Program) -> list[Operation]:
        """The operations of one of the programs, one a mark, in order."""
        return self._operations[id(program)]

    def encoded(self, name: str) -> Tensor:
        """The encoded tensor of this name."""
        tensor = self.tensors[name]
        assert isinstance(tensor, Tensor)
        return tensor

    def raw(self, name: str) -> RawTensor:
        """The FP32 array of this name."""
        tensor = self.tensors[name]
        assert isinstance(tensor, RawTensor)
        return tensor

    # Memory.

    def _encoded(
        self, name: str, kind: TensorKind, policy: str, images: int, height: int, width: int, channels: int
    ) -> Tensor:
        """Place an encoded tensor; `policy` names its kind in `Formats`, which may be dynamic."""
        last = self.graph.nodes[-1].name
        state = 0
        if policy in self.targets and name not in ("images", f"d.{last}"):
            state = len(self.dynamic) + 1
            if state >= self.config.tensor_states:
                raise ValueError(
                    f"{name} is dynamic tensor {state}, but tensor_states = {self.config.tensor_states} allows "
                    f"{self.config.tensor_states - 1}"
                )
        tensor = self.map.tensor(
            name,
            kind,
            images=images,
            height=height,
            width=width,
            channels=channels,
            policy=getattr(self.formats, policy),
            state=state,
        )
        self.tensors[name] = tensor
        if state:
            self.dynamic.append((tensor, self.targets[policy]))
            self.records[name] = self.map.allocate(f"{name} (record)", 32, 32)
        return tensor

    def _tensor(self, name: str, kind: TensorKind, policy: str, shape: tuple[int, int, int]) -> Tensor:
        """Place a tensor of this shape for the whole batch."""
        channels, height, width = shape
        return self._encoded(name, kind, policy, self.batch, height, width, channels)

    def _raw(self, name: str, kind: TensorKind, *, rows: int = 1, channels: int) -> RawTensor:
        tensor = self.tensors[name] = self.map.raw(name, kind, rows=rows, channels=channels)
        return tensor

    def _vector(self, name: str, channels: int) -> RawTensor:
        return self._raw(name, TensorKind.NORM, channels=channels)

    def _place(self) -> None:
        shapes = self.graph.shapes
        activation = TensorKind.ACTIVATION
        self._tensor("images", activation, "activation", shapes["images"])
        if any(isinstance(stage, GroupStage) and stage.norm and stage.x == "images" for stage in self.stages):
            self._tensor("d.images", TensorKind.ERROR, "error", shapes["images"])
        for stage in self.stages:
            shape = shapes[stage.name]
            match stage:
                case ConvStage():
                    self._tensor(stage.name, activation, "preactivation", shape)
                    self._weights(stage.name, stage.node, shapes[stage.x][0])
                case LinearStage():
                    self._raw(stage.name, TensorKind.OTHER, rows=self.batch, channels=shape[0])
                    self._weights(stage.name, stage.node, shapes[stage.x][0])
                    self._vector_parameter(f"{stage.name}.bias", shape[0])
                case GroupStage():
                    self._tensor(stage.name, activation, "activation", shape)
                    if stage.norm is not None:
                        self._norm(stage.norm, shape[0])
                case PoolStage():
                    self._tensor(stage.name, activation, "activation", shape)
                    if isinstance(stage.node, MaxPool):
                        index = Policy.between(0.0, 16.0)  # larger ones may have no FP8 pattern
                        self.tensors[f"{stage.name}.winner"] = self.map.tensor(
                            f"{stage.name}.winner",
                            activation,
                            images=self.batch,
                            height=shape[1],
                            width=shape[2],
                            channels=shape[0],
                            policy=index,
                        )
            self._tensor(f"d.{stage.name}", TensorKind.ERROR, "error", shape)

    def _weights(self, name: str, node: Conv | Linear, inputs: int) -> None:
        kernel = node.kernel if isinstance(node, Conv) else 1
        padded = self.encoded(node.x).padded
        taps = kernel * kernel
        weight = self._encoded(f"w.{name}", TensorKind.WEIGHT, "weight", 1, taps, padded, node.outputs)
        gradient = self._encoded(f"g.{name}", TensorKind.GRADIENT, "gradient", 1, taps, padded, node.outputs)
        rows = taps * padded
        momentum: RawTensor | Tensor
        if self.formats.momentum is None:
            momentum = self._raw(f"momentum.{name}", TensorKind.OPTIMIZER, rows=rows, channels=node.outputs)
        else:
            momentum = self._encoded(
                f"momentum.{name}", TensorKind.OPTIMIZER, "momentum", 1, taps, padded, node.outputs
            )
        self.weights[name] = WeightParameter(
            name,
            self._raw(f"master.{name}", TensorKind.OPTIMIZER, rows=rows, channels=node.outputs),
            momentum,
            gradient,
            weight,
        )

    def _vector_parameter(self, name: str, channels: int) -> VectorParameter:
        parameter = VectorParameter(
            name,
            self._vector(f"master.{name}", channels),
            self._vector(f"momentum.{name}", channels),
            self._vector(f"g.{name}", channels),
        )
        self.vectors[name] = parameter
        return parameter

    def _norm(self, name: str, channels: int) -> None:
        gamma = self._vector_parameter(f"{name}.gamma", channels)
        beta = self._vector_parameter(f"{name}.beta", channels)
        saved = {
            part: self._vector(f"{name}.{part}", channels)
            for part in ("running_mean", "running_var", "mean", "invstd", "a", "b", "grad_b", "grad_c")
        }
        self.norms[name] = NormTensors(
            gamma=gamma.master, beta=beta.master, dgamma=gamma.gradient, dbeta=beta.gradient, **saved
        )

    # Programs.

    def _compile(self, body: Callable[[Program], None]) -> Program:
        program = Program(self.config)
        self._operations[id(program)] = []
        self._mark(program, "start", "vector")
        body(program)
        program.end()
        self.tensors[f"program {body.__name__}"] = RawTensor(
            body.__name__,
            TensorKind.PROGRAM,
            1,
            program.size // 4,
            program.size // 4,
            self.map.allocate(f"program {body.__name__}", program.size, COMMAND_BYTES),
        )
        return program

    def address(self, program: Program) -> int:
        """Where a program goes in memory."""
        for name in ("initial", "forward", "inference", "backward", "update"):
            if getattr(self, name) is program:
                return self.raw(f"program _{name}").address
        raise ValueError("no such program")

    def _mark(self, program: Program, layer: str, phase: str, outputs: list[str] | None = None, macs: int = 0) -> None:
        for tensor in program.open:
            self._adapt(program, tensor)
        program.open.clear()
        program.mark(layer, phase, self.map.allocate("counters", MARK_BYTES), macs)
        self._operations[id(program)].append(Operation(layer, phase, macs, outputs or []))

    def _convolution(self, stage: ConvStage | LinearStage) -> Convolution:
        channels, height, width = self.graph.shapes[stage.x]
        node = stage.node
        kernel, stride, padding = (node.kernel, node.stride, node.padding) if isinstance(node, Conv) else (1, 1, 0)
        return Convolution(self.batch, channels, height, width, node.outputs, kernel, kernel, stride, padding)

    def _adapt(self, program: Program, tensor: Tensor) -> None:
        """Let the chip choose how a tensor is stored next time."""
        targets = next(targets for dynamic, targets in self.dynamic if dynamic is tensor)
        program.emit(
            Opcode.ADAPT,
            reads=[STATISTICS],
            writes=[STATISTICS],
            tensor=tensor.state,
            address=self.records[tensor.name],
            **{part.name: int(getattr(targets, part.name)) for part in fields(targets)},
        )

    def _initial(self, program: Program) -> None:
        for tensor, _ in self.dynamic:
            policy = tensor.policy
            program.emit(Opcode.STATE, tensor=tensor.state, scale=policy.scale, lo=policy.lo_bits, hi=policy.hi_bits)
        self._mark(program, "states", "vector")

    def _forward(self, program: Program) -> None:
        self._feed_forward(program, training=True)

    def _inference(self, program: Program) -> None:
        self._feed_forward(program, training=False)

    def _feed_forward(self, program: Program, *, training: bool) -> None:
        space = Workspace(program)
        for stage in self.stages:
            match stage:
                case ConvStage():
                    self._conv_forward(space, stage, training=training)
                case GroupStage():
                    self._group_forward(space, stage, training=training)
                case PoolStage(node=MaxPool() as node):
                    layers.lower_max_pool(
                        space,
                        self.encoded(stage.x),
                        self.encoded(stage.name),
                        self.encoded(f"{stage.name}.winner"),
                        kernel=node.kernel,
                        stride=node.stride,
                        padding=node.padding,
                    )
                    self._mark(program, stage.name, "vector", [stage.name, f"{stage.name}.winner"])
                case PoolStage(node=GlobalAveragePool()):
                    layers.lower_average_pool(space, self.encoded(stage.x), self.encoded(stage.name))
                    self._mark(program, stage.name, "vector", [stage.name])
                case LinearStage():
                    self._linear_forward(space, stage)

    def _conv_forward(self, space: Workspace, stage: ConvStage, *, training: bool) -> None:
        y = self.encoded(stage.name)
        sums = stage.norm is not None and training

        def epilogue(tile: Tile, place: int, first: bool, scratch: list[int]) -> None:
            if sums:
                layers.take_statistics(space, y, tile, place, first=first)
            space.vectors.store(y, tile, place)

        def after_block(block: int) -> None:
            assert stage.norm is not None
            norm = self.norms[stage.norm]
            layers.finish_statistics(space, y, norm, block, eps=self.eps, momentum=self.norm_momentum)

        shape = self._convolution(stage)
        lower_forward(
            space.program,
            shape,
            self.encoded(stage.x),
            self.weights[stage.name].weight,
            y,
            Rounding(True, y.policy.scale),
            epilogue,
            vmem=space.tiles,
            vmem_end=space.end,
            after_block=after_block if sums else None,
            most_planes=layers.statistics_rows(space, y).blocks if sums else None,
        )
        outputs = [stage.name]
        if sums:
            outputs += [f"{stage.norm}.{name}" for name in ("mean", "invstd", "a", "b", "running_mean", "running_var")]
        self._mark(space.program, stage.name, "ff", outputs, shape.macs)

    def _group_forward(self, space: Workspace, stage: GroupStage, *, training: bool) -> None:
        source, out = self.encoded(stage.x), self.encoded(stage.name)
        norm = self.norms[stage.norm] if stage.norm is not None else None
        outputs = [stage.name]
        if norm is not None:
            summed = any(isinstance(s, ConvStage) and s.norm == stage.norm for s in self.stages)
            for block in range(source.planes):
                if not training:
                    layers.use_running_statistics(space, source, norm, block, eps=self.eps)
                elif not summed:
                    layers.lower_statistics(space, source, block)
                    layers.finish_statistics(space, source, norm, block, eps=self.eps, momentum=self.norm_momentum)
            if not training:
                outputs += [f"{stage.norm}.{name}" for name in "ab"]
            elif not summed:
                names = ("mean", "invstd", "a", "b", "running_mean", "running_var")
                outputs += [f"{stage.norm}.{name}" for name in names]
        other = self.encoded(stage.other) if stage.other is not None else None
        layers.lower_group(space, source, out, norm=norm, other=other, relu=stage.relu)
        self._mark(space.program, stage.name, "vector", outputs)

    def _linear_forward(self, space: Workspace, stage: LinearStage) -> None:
        logits = self.raw(stage.name)
        out = self.encoded(f"d.{stage.name}")  # its shape: one pixel an image
        bias = self.vectors[f"{stage.name}.bias"].master
        v = space.vectors

        def epilogue(tile: Tile, place: int, first: bool, scratch: list[int]) -> None:
            row = space.vector(0)
            v.load_raw(bias, row, block=tile.block)
            v.vector(VectorOp.ADD, place, place, row, outer=tile.count, inner=tile.rows, broadcast="b")
            v.store_raw(logits, place, row=tile.image, rows=tile.images, block=tile.block)

        shape = self._convolution(stage)
        lower_forward(
            space.program,
            shape,
            self.encoded(stage.x),
            self.weights[stage.name].weight,
            out,
            Rounding(False),
            epilogue,
            vmem=space.tiles,
            vmem_end=space.end,
        )
        self._mark(space.program, stage.name, "ff", [stage.name], shape.macs)

    def _backward(self, program: Program) -> None:
        space = Workspace(program)
        shared = shared_errors(self.stages)

        def error(name: str) -> Tensor:
            return self.encoded(f"d.{shared.get(name, name)}")

        for stage in reversed(self.stages):
            if not isinstance(stage, LinearStage) and stage.name not in shared:
                self._error(space, stage.name, error)
            match stage:
                case ConvStage() | LinearStage():
                    self._weight_grad(space, stage, error(stage.name))
                case GroupStage(norm=str(norm)):
                    sums = self._error_sums(space, stage.x)
                    y = self.encoded(stage.x)
                    layers.lower_norm_grad(space, error(stage.name), y, self.norms[norm], sums)
                    self._mark(program, stage.name, "vector", [sums.error.name, *sums.outputs])

    def _error(self, space: Workspace, name: str, error: Callable[[str], Tensor]) -> None:
        """The error of stored tensor `name` from all its uses."""
        stored: list[Tensor] = []
        pools: list[PoolStage] = []
        convolutions: list[ConvStage | LinearStage] = []
        for stage in reversed(self.stages):
            match stage:
                case GroupStage(norm=str(), x=x) if x == name:
                    return  # batch norm backward has written it
                case GroupStage(x=x, other=other) if name in (x, other):
                    stored.append(error(stage.name))
                case PoolStage(x=x) if x == name:
                    pools.append(stage)
                case ConvStage(x=x) | LinearStage(x=x) if x == name:
                    convolutions.append(stage)
        out = self.encoded(f"d.{name}")
        mask = self.encoded(name) if name in self.relu else None
        alone = len(stored) + len(pools) + len(convolutions) == 1
        sums = self._error_sums(space, name)
        for pool in pools:
            target = out if alone else self._partial(f"d.{name}.{pool.name}", out)
            taken = sums if alone else ErrorSums(space, target, [])
            self._pool_grad(space, pool, error(pool.name), mask if alone else None, target, taken)
            stored.append(target)
            self._mark(space.program, pool.name, "vector", [target.name, *taken.outputs])
        if alone and pools:
            return
        if not convolutions:
            layers.lower_sum_errors(space, stored, mask, out, sums)
            self._mark(space.program, name, "vector", [out.name, *sums.outputs])
            return
        for stage in convolutions[:-1]:
            target = self._partial(f"d.{name}.{stage.name}", out)
            self._input_grad(space, stage, error(stage.name), stored, None, ErrorSums(space, target, []), exact=False)
            stored = [target]
        stage = convolutions[-1]
        self._input_grad(space, stage, error(stage.name), stored, mask, sums, exact=alone)

    def _error_sums(self, space: Workspace, name: str) -> ErrorSums:
        """What batch norms need of the error of tensor `name`."""
        groups = self._norms_of_errors.get(name, [])
        norms = [(self.encoded(group.x), self.norms[str(group.norm)]) for group in groups]
        return ErrorSums(space, self.encoded(f"d.{name}"), norms)

    def _partial(self, name: str, like: Tensor) -> Tensor:
        return self._tensor(name, TensorKind.ERROR, "error", (like.channels, like.height, like.width))

    def _pool_grad(
        self, space: Workspace, stage: PoolStage, error: Tensor, mask: Tensor | None, out: Tensor, sums: ErrorSums
    ) -> None:
        match stage.node:
            case MaxPool() as node:
                layers.lower_max_pool_grad(
                    space,
                    error,
                    self.encoded(f"{stage.name}.winner"),
                    mask,
                    out,
                    sums,
                    kernel=node.kernel,
                    stride=node.stride,
                    padding=node.padding,
                )
            case GlobalAveragePool():
                layers.lower_average_pool_grad(space, error, mask, out, sums)

    def _input_grad(
        self,
        space: Workspace,
        stage: ConvStage | LinearStage,
        dy: Tensor,
        addends: list[Tensor],
        mask: Tensor | None,
        sums: ErrorSums,
        *,
        exact: bool,
    ) -> None:
        """The term of a convolution or linear layer in the error of its input, added up, masked, summed and stored."""
        v, out = space.vectors, sums.error
        shape = self._convolution(stage)
        # What the cores have masked can be told from the rest until a term is added.
        in_cores = mask is not None and len(addends) <= 1 and masks_outputs(space.program, shape, out)
        operands = [*addends, *([mask] if mask is not None and not in_cores else [])]

        def epilogue(tile: Tile, place: int, first: bool, scratch: list[int]) -> None:
            for operand, row in zip([*operands, *sums.inputs], scratch, strict=True):
                v.load(operand, tile, row)
            terms = scratch[: len(addends)]
            if in_cores:
                for term in terms:
                    layers.add_unmasked(space, tile, place, term)
            else:
                at_mask = scratch[len(addends)] if mask is not None else None
                layers.add_and_mask(space, tile, place, terms, at_mask)
            sums.add(tile, place, scratch[len(operands) :], first=first)
            v.store(out, tile, place)

        lower_input_grad(
            space.program,
            shape,
            dy,
            self.weights[stage.name].weight,
            out,
            Rounding(True, out.policy.scale) if exact else Rounding(False),
            epilogue,
            vmem=space.tiles,
            vmem_end=space.end,
            reserve=len(operands) + len(sums.inputs),
            after_block=sums.finish,
            most_planes=sums.at.blocks if sums.norms else None,
            mask=mask if in_cores else None,
        )
        self._mark(space.program, stage.name, "bp", [out.name, *sums.outputs], shape.macs)

    def _weight_grad(self, space: Workspace, stage: ConvStage | LinearStage, dy: Tensor) -> None:
        parameter = self.weights[stage.name]
        gradient = parameter.gradient
        shape = self._convolution(stage)
        lower_weight_grad(
            space.program,
            shape,
            self.encoded(stage.x),
            dy,
            gradient,
            Rounding(True, gradient.policy.scale),
            lambda tile, place, first, scratch: space.vectors.store(gradient, tile, place),
            vmem=space.tiles,
            vmem_end=space.end,
        )
        self._mark(space.program, stage.name, "wg", [gradient.name], shape.macs)
        if isinstance(stage, LinearStage):
            self._bias_grad(space, stage, dy)

    def _bias_grad(self, space: Workspace, stage: LinearStage, dy: Tensor) -> None:
        v, rows = space.vectors, dy.block_channels // self.config.beat
        gradient = self.vectors[f"{stage.name}.bias"].gradient
        for block in range(dy.planes):
            space.stream(
                dy,
                [block],
                1,
                lambda tile, at: v.load(dy, tile, at[0]),
                lambda tile, at: v.sum(0, at[0], 1.0, pixels=tile.count, rows=rows, initialise=tile.begins, a_of=dy),
            )
            v.sum_out(space.vector(0), 0, rows=rows, a_of=dy)
            v.store_raw(gradient, space.vector(0), block=block)
        self._mark(space.program, f"{stage.name}.bias", "vector", [gradient.name])

    def _update(self, program: Program) -> None:
        space = Workspace(program)
        for name, weight in self.weights.items():
            layers.lower_update(space, self.optimiser, weight.master, weight.momentum, weight.gradient, weight.weight)
            outputs = [weight.master.name, weight.momentum.name, weight.weight.name]
            self._mark(program, name, "update", outputs)
        outputs = []
        for vector in self.vectors.values():
            layers.lower_vector_update(space, self.optimiser, vector.master, vector.momentum, vector.gradient)
            outputs += [vector.master.name, vector.momentum.name]
        self._mark(program, "norms and biases", "update", outputs)
