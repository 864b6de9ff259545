"""JSON Schemas of the fields that examples/cluster uses, written from the public API references.

Kubernetes API reference (Container, PodSpec, Volume), Kubeflow training operator v1 (PyTorchJob),
Kubeflow Trainer v2 (TrainJob), SkyPilot's task YAML. A field that is not here is an error: a misspelt
one is not ignored.
"""


def strict(required=(), **properties):
    return {
        "type": "object", "properties": properties, "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


def listing(of):
    return {"type": "array", "items": of, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
METADATA = strict(["name"], name=NAME)
RESOURCES = strict(
    limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
)
CONTAINER = strict(
    ["name", "image"],
    name={"const": "pytorch"}, image=TEXT, workingDir=TEXT, command=listing(TEXT),
    args=listing(TEXT), resources=RESOURCES,
    ports=listing(strict(["containerPort"], name={"type": "string", "maxLength": 15},
                         containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    volumeMounts=listing(strict(["name", "mountPath"], name=NAME, mountPath=TEXT)),
)  # fmt: skip
VOLUME = strict(
    ["name"],
    name=NAME,
    persistentVolumeClaim=strict(["claimName"], claimName=NAME),
    emptyDir=strict(medium={"enum": ["", "Memory"]}),
)
POD = strict(
    ["spec"], spec=strict(["containers"], containers=listing(CONTAINER), volumes=listing(VOLUME))
)
REPLICA = strict(
    ["template"],
    replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=POD,
)
PYTORCH_JOB = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=METADATA,
    spec=strict(
        ["pytorchReplicaSpecs"],
        nprocPerNode={"type": "string", "pattern": "^([0-9]+|auto|cpu|gpu)$"},
        runPolicy=strict(
            cleanPodPolicy={"enum": ["All", "Running", "None"]},
            backoffLimit={"type": "integer", "minimum": 0},
        ),
        pytorchReplicaSpecs=strict(["Master"], Master=REPLICA, Worker=REPLICA),
    ),
)
TRAIN_JOB = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=METADATA,
    spec=strict(
        ["runtimeRef"],
        runtimeRef=strict(
            ["name"],
            name=NAME,
            kind={"enum": ["ClusterTrainingRuntime", "TrainingRuntime"]},
            apiGroup={"const": "trainer.kubeflow.org"},
        ),
        trainer=strict(
            image=TEXT, numNodes=COUNT, numProcPerNode={"type": ["integer", "string"]},
            command=listing(TEXT), args=listing(TEXT), resourcesPerNode=RESOURCES,
        ),
    ),
)  # fmt: skip
SKY_TASK = strict(
    ["run"],
    name=NAME,
    num_nodes=COUNT,
    resources=strict(
        accelerators={"type": "string", "pattern": "^[A-Za-z0-9-]+:[0-9]+$"}, disk_size=COUNT
    ),
    workdir=TEXT,
    envs={"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    setup=TEXT,
    run=TEXT,
)
