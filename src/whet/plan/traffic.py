"""What ranks send to each other in a step, and how long that takes.

Bytes are those a rank sends. A ring over g ranks: an all-reduce of B bytes sends 2 (g-1)/g B, an
all-gather or a reduce-scatter (g-1)/g B. DDP and ZeRO 2 so send 2 (g-1)/g of the gradients, ZeRO 3 and
FSDP half as much again (arXiv 1910.02054, section 7; arXiv 2304.11277); tensor parallel reduces the
hidden states of every layer twice forward and twice backward (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from whet.plan.pieces import Pieces, Strategy

# One way, for one GPU. NVLink of an H100: 900 GB/s both ways together (NVIDIA's H100 data sheet).
# Network: one port of 400 Gbit/s a GPU (NVIDIA's DGX H100 data sheet: eight ConnectX-7 ports
# for eight GPUs, and 2 TB of host memory).
NVLINK = 450e9
NETWORK = 50e9
# Assumptions: what a ring reaches of a link, and how long one message takes on its way.
LINK_EFFICIENCY = 0.8
NVLINK_LATENCY, NETWORK_LATENCY = 2e-6, 5e-6
DISK = 2e9
HOST_BYTES = 2 * 10**12


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a run, as numbers that a person can replace by their own.

    Args:
        num_ranks: Processes, one a GPU.
        num_nodes: Machines.
        inside: Bytes a second from one GPU to another of its machine, one way.
        across: Bytes a second from one GPU to another machine, one way: the machine's over its GPUs.
        efficiency: Share of both that a ring reaches.
        inside_latency: Seconds of one message within a machine.
        across_latency: Seconds of one message between machines.
        disk: Bytes a second of the disk that checkpoints are written to.
        host_bytes: Memory of one machine that its processes may use.
    """

    num_ranks: int
    num_nodes: int = 1
    inside: float = NVLINK
    across: float = NETWORK
    efficiency: float = LINK_EFFICIENCY
    inside_latency: float = NVLINK_LATENCY
    across_latency: float = NETWORK_LATENCY
    disk: float = DISK
    host_bytes: int = HOST_BYTES

    @property
    def ranks_per_node(self) -> int:
        """Processes of one machine."""
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a rank sends in a step for one purpose.

    Args:
        name: The purpose.
        num_bytes: Sent by a rank.
        calls: Collective calls.
        rounds: Messages one after the other in a call.
        group: Ranks that take part.
        stride: Distance between them.
    """

    name: str
    num_bytes: float
    calls: float
    rounds: int
    group: int
    stride: int = 1

    def seconds(self, cluster: Cluster) -> float:
        """Return how long it takes when nothing hides it."""
        members = max(1, cluster.ranks_per_node // self.stride)  # of the group, on one machine
        if self.group <= members:
            return (
                self.num_bytes / (cluster.inside * cluster.efficiency)
                + self.calls * self.rounds * cluster.inside_latency
            )
        rate = min(cluster.inside, cluster.across) * cluster.efficiency
        crossing = self.rounds / members
        hop = crossing * cluster.across_latency + (self.rounds - crossing) * cluster.inside_latency
        return self.num_bytes / rate + self.calls * hop


def transfers(
    pieces: Pieces, strategy: Strategy, num_ranks: int, passes: float, tokens: float, labels: float
) -> list[Transfer]:
    """List what a rank sends in a step.

    Args:
        pieces: The model's, whole.
        strategy: How it is shared.
        num_ranks: In all.
        passes: Of a step.
        tokens: Of a step, in one replica.
        labels: Those of them that are learned.
    """
    width, replicas = strategy.tensor, num_ranks // strategy.tensor
    own, found = pieces.within(width), []
    if width > 1:
        layers, share = pieces.num_layers, (width - 1) / width
        hidden = pieces.size * pieces.width * tokens
        # The embeddings are cut too: their rows are put together by one more all-reduce.
        num = 4 * layers + 1
        found.append(
            Transfer(
                "hidden states", 2 * share * num * hidden, num * passes, 2 * (width - 1), width
            )
        )
        logits = pieces.size * pieces.vocabulary * labels
        found.append(Transfer("logits", share * logits, passes, width - 1, width))
    if replicas == 1:
        return found
    return found + list(_of_replicas(own, strategy, replicas, passes))


def _of_replicas(own: Pieces, strategy: Strategy, replicas: int, passes: float) -> list[Transfer]:
    trained = sum(n * p.num_bytes for p, n in own.trained())
    share, ring, stride = (replicas - 1) / replicas, replicas - 1, strategy.tensor
    num = own.num_layers
    if strategy.kind == "ddp":
        buckets = -(-trained // (25 * 2**20))  # DDP's default `bucket_cap_mb`
        return [Transfer("gradients", 2 * share * trained, buckets, 2 * ring, replicas, stride)]
    if strategy.kind == "zero2":
        return [
            Transfer("gradients", share * trained * passes, passes, ring, replicas, stride),
            Transfer("new weights", share * trained, 1, ring, replicas, stride),
        ]
    layers = sum(n * p.sent_bytes for layer, n in own.layers for p in layer)
    outside = sum(p.sent_bytes for p in own.outside)
    # FSDP2 keeps what is outside of the layers from the forward to the backward pass.
    again = 1 if strategy.kind == "fsdp" else 2
    weights = share * passes * (2 * layers + again * outside)
    calls = passes * (2 * num + again)
    # An adapter's gradients are small enough to wait for the last pass (FSDP2's gradient sync off).
    times = 1.0 if strategy.kind == "fsdp" and own.adapted else passes
    return [
        Transfer("weights", weights, calls, ring, replicas, stride),
        Transfer("gradients", share * trained * times, times * (num + 1), ring, replicas, stride),
    ]


def exposed_seconds(
    found: list[Transfer], strategy: Strategy, cluster: Cluster, compute: float, passes: float
) -> float:
    """Return the seconds of communication that computing does not hide.

    The assumption: tensor parallel waits for each of its sums. DDP's gradients travel under the backward
    pass of the step's last pass, ZeRO 2's under every one (half of a pass's time), the weights of FSDP
    and ZeRO 3 under all of it.

    Args:
        found: What is sent.
        strategy: How the model is shared.
        cluster: The machines.
        compute: Seconds that a step computes.
        passes: Of a step.
    """
    waited = sum(t.seconds(cluster) for t in found if t.name in ("hidden states", "logits"))
    hidden = sum(t.seconds(cluster) for t in found) - waited
    room = {"ddp": 0.5 * compute / max(passes, 1), "zero2": 0.5 * compute}
    return waited + max(0.0, hidden - room.get(strategy.kind, compute))
