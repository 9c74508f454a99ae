"""Networks as graphs of layers, and their fusion into stages that the chip runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = [
    "Add",
    "BatchNorm",
    "Conv",
    "ConvStage",
    "GlobalAveragePool",
    "Graph",
    "GroupStage",
    "Linear",
    "LinearStage",
    "MaxPool",
    "PoolStage",
    "Relu",
    "Stage",
    "fuse",
    "norms_of_errors",
    "resnet18",
    "shared_errors",
]


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, square kernel."""

    name: str
    x: str
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation over images and pixels."""

    name: str
    x: str


@dataclass(frozen=True)
class Add:
    """Sum of two tensors of one shape."""

    name: str
    x: str
    other: str


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""

    name: str
    x: str


@dataclass(frozen=True)
class MaxPool:
    """Max pooling, square window, padded with -infinity."""

    name: str
    x: str
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True)
class GlobalAveragePool:
    """Mean over all pixels of an image."""

    name: str
    x: str


@dataclass(frozen=True)
class Linear:
    """Fully connected layer with bias on an image of one pixel; the last node of a network that is trained."""

    name: str
    x: str
    outputs: int


Node = Conv | BatchNorm | Add | Relu | MaxPool | GlobalAveragePool | Linear


@dataclass
class Graph:
    """A network: nodes in topological order on an input named "images".

    Attributes
    ----------
    name : str
    channels, height, width : int
        Shape of an input image.
    nodes : list of Node
    shapes : dict of str to (channels, height, width)
        Of every output, filled in by `add`.
    """

    name: str
    channels: int
    height: int
    width: int
    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        self.shapes["images"] = (self.channels, self.height, self.width)

    def add(self, node: Node) -> str:
        """Append a node and return its name; `ValueError` if it does not fit what is there."""
        if node.name in self.shapes:
            raise ValueError(f"names must be unique, not {node.name!r} twice")
        for source in (node.x, getattr(node, "other", node.x)):
            if source not in self.shapes:
                raise ValueError(f"{node.name} reads {source!r}, which is not one of {', '.join(self.shapes)}")
        for field_name, least in (("outputs", 1), ("kernel", 1), ("stride", 1), ("padding", 0)):
            value = getattr(node, field_name, least)
            if value < least:
                raise ValueError(f"{field_name} of {node.name} must be at least {least}, not {value!r}")
        channels, height, width = self.shapes[node.x]
        match node:
            case MaxPool() if node.padding > node.kernel // 2:
                raise ValueError(
                    f"padding of {node.name} must be at most half the kernel, {node.kernel // 2}, not {node.padding!r}"
                )
            case Conv() | MaxPool():
                height = (height + 2 * node.padding - node.kernel) // node.stride + 1
                width = (width + 2 * node.padding - node.kernel) // node.stride + 1
                channels = node.outputs if isinstance(node, Conv) else channels
                if min(height, width) < 1:
                    raise ValueError(f"{node.name}: a kernel of {node.kernel} does not fit {self.shapes[node.x]}")
            case Add():
                if node.other == node.x:
                    raise ValueError(f"{node.name} must add two tensors, not {node.x} to itself")
                if self.shapes[node.other] != self.shapes[node.x]:
                    raise ValueError(
                        f"{node.name} adds {self.shapes[node.x]} and {self.shapes[node.other]}: shapes must be equal"
                    )
            case GlobalAveragePool():
                height = width = 1
            case Linear():
                if (height, width) != (1, 1):
                    raise ValueError(f"{node.name} needs images of one pixel, not {height}x{width}")
                channels = node.outputs
        self.nodes.append(node)
        self.shapes[node.name] = (channels, height, width)
        return node.name

    def consumers(self, name: str) -> list[Node]:
        """Nodes that read output `name`."""
        return [node for node in self.nodes if name in (node.x, getattr(node, "other", None))]


@dataclass(frozen=True)
class ConvStage:
    """A convolution; `norm` names the batch norm whose sums are taken on the way."""

    name: str
    x: str
    node: Conv
    norm: str | None


@dataclass(frozen=True)
class GroupStage:
    """A pointwise group: batch norm, sum with another tensor, ReLU, each optional; `name` is its last node's."""

    name: str
    x: str
    norm: str | None
    other: str | None
    relu: bool


@dataclass(frozen=True)
class PoolStage:
    """A pooling."""

    name: str
    x: str
    node: MaxPool | GlobalAveragePool


@dataclass(frozen=True)
class LinearStage:
    """The fully connected layer."""

    name: str
    x: str
    node: Linear


Stage = ConvStage | GroupStage | PoolStage | LinearStage


def fuse(graph: Graph) -> list[Stage]:
    """The stages of a graph, in order; chains of batch norm, add and ReLU with one consumer each become one stage.

    Raises
    ------
    ValueError
        If an output but the last is not used, the input of a batch norm is used elsewhere too, or a linear layer is not
        the last node.
    """
    for node in graph.nodes[:-1]:
        consumers = graph.consumers(node.name)
        if not consumers:
            raise ValueError(f"nothing reads {node.name}")
        if isinstance(node, Linear):
            raise ValueError(f"{consumers[0].name} reads {node.name}, but a linear layer must be the last node")
    for node in graph.nodes:
        consumers = graph.consumers(node.x)
        if isinstance(node, BatchNorm) and len(consumers) > 1:
            names = ", ".join(consumer.name for consumer in consumers)
            raise ValueError(f"the input of a batch norm must have no other use, but {node.x} has {names}")
    stages: list[Stage] = []
    taken: set[str] = set()

    def follower(name: str, kind: type) -> Node | None:
        consumers = graph.consumers(name)
        if len(consumers) == 1 and isinstance(consumers[0], kind) and consumers[0].x == name:
            return consumers[0]
        return None

    # A chain runs where its last operand is there, so it takes the place of its last node.
    chains: dict[str, GroupStage] = {}
    for node in graph.nodes:
        if node.name in taken or not isinstance(node, BatchNorm | Add | Relu):
            continue
        last: Node = node
        norm = other = None
        relu = False
        if isinstance(last, BatchNorm):
            norm = last.name
            last = follower(last.name, Add) or follower(last.name, Relu) or last
        if isinstance(last, Add):
            other = last.other
            taken.add(last.name)
            last = follower(last.name, Relu) or last
        if isinstance(last, Relu):
            relu = True
        taken |= {node.name, last.name}
        chains[last.name] = GroupStage(last.name, node.x, norm, other, relu)
    for node in graph.nodes:
        match node:
            case Conv():
                follows = follower(node.name, BatchNorm)
                stages.append(ConvStage(node.name, node.x, node, follows.name if follows is not None else None))
            case MaxPool() | GlobalAveragePool():
                stages.append(PoolStage(node.name, node.x, node))
            case Linear():
                stages.append(LinearStage(node.name, node.x, node))
            case _:
                if node.name in chains:
                    stages.append(chains[node.name])
    return stages


def shared_errors(stages: Sequence[Stage]) -> dict[str, str]:
    """Stored tensors whose error is that of another one as stored, and which: their only use is in a group that hands
    its error on, and they are not outputs of a ReLU."""
    shared: dict[str, str] = {}
    for stage in reversed(stages):
        uses = [use for use in stages if stage.name in (use.x, getattr(use, "other", None))]
        if len(uses) != 1 or not isinstance(uses[0], GroupStage) or (isinstance(stage, GroupStage) and stage.relu):
            continue
        use = uses[0]
        if use.norm is None or use.x != stage.name:
            shared[stage.name] = shared.get(use.name, use.name)
    return shared


def norms_of_errors(stages: Sequence[Stage]) -> dict[str, list[GroupStage]]:
    """The groups with a batch norm that take the stored error of each tensor, in the order of back-propagation."""
    shared = shared_errors(stages)
    norms: dict[str, list[GroupStage]] = {}
    for stage in reversed(stages):
        if isinstance(stage, GroupStage) and stage.norm is not None:
            norms.setdefault(shared.get(stage.name, stage.name), []).append(stage)
    return norms


def resnet18(*, width: int = 8, channels: int = 1, image: int = 8, classes: int = 10, stem: str = "cifar") -> Graph:
    """ResNet-18 with `width` channels in its first stage (64 in the paper, He et al. 2015).

    Parameters
    ----------
    image : int
        Height and width of the images.
    stem : str
        "cifar" (3x3 stride 1) or "imagenet" (7x7 stride 2 and max pooling).
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem must be 'cifar' or 'imagenet', not {stem!r}")
    graph = Graph(f"resnet18-w{width}-{image}x{image}", channels, image, image)
    if stem == "cifar":
        x = graph.add(Conv("stem.conv", "images", width, 3, 1, 1))
    else:
        x = graph.add(Conv("stem.conv", "images", width, 7, 2, 3))
    x = graph.add(Relu("stem.relu", graph.add(BatchNorm("stem.bn", x))))
    if stem == "imagenet":
        x = graph.add(MaxPool("stem.pool", x, 3, 2, 1))
    for stage in range(4):
        for block in range(2):
            name, outputs = f"layer{stage + 1}.{block}", width << stage
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x
            y = graph.add(Conv(f"{name}.conv1", x, outputs, 3, stride, 1))
            y = graph.add(Relu(f"{name}.relu1", graph.add(BatchNorm(f"{name}.bn1", y))))
            y = graph.add(Conv(f"{name}.conv2", y, outputs, 3, 1, 1))
            y = graph.add(BatchNorm(f"{name}.bn2", y))
            if graph.shapes[x][0] != outputs or stride != 1:
                shortcut = graph.add(Conv(f"{name}.down.conv", x, outputs, 1, stride, 0))
                shortcut = graph.add(BatchNorm(f"{name}.down.bn", shortcut))
            x = graph.add(Relu(f"{name}.relu2", graph.add(Add(f"{name}.add", y, shortcut))))
    x = graph.add(GlobalAveragePool("pool", x))
    graph.add(Linear("fc", x, classes))
    return graph
