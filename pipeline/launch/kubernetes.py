"""Kubernetes: a Job for one host, a JobSet for several.

75 (preempted) and a pod that was taken away count as no failure; any other code ends the job.
Source: https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy,
https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/.
"""

from __future__ import annotations

import re
from textwrap import indent

from pipeline.errors import UserError, one_line
from pipeline.launch.job import (
    STORE,
    Job,
    Profile,
    check_name,
    check_root,
    ranks_of_host,
    require,
    shell_words,
    yaml_text,
)

TAKES = ("gpu", "image", "claim", "queue", "priority", "node")
GPU = "nvidia.com/gpu"
LABEL = r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?"  # names of objects (RFC 1123)
RESOURCE = rf"{LABEL}/[\w.-]+"
NODE = r"([\w./-]+)=([\w.-]*)"
PULLED_S = 600  # that pulling the image may take: a pod's deadline counts it

HEAD = """\
# {what}. Written by
#   {command}
# Start it: kubectl apply -f {file}
# 75 (preempted) and a pod that was taken away count as no failure; any other code ends the job.
"""
JOB = """\
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}{labels}
spec:
{spec}"""
JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}{labels}
spec:
  network:
    enableDNSHostnames: true
    subdomain: {name}
  failurePolicy:
    maxRestarts: 3  # where a node is gone, the other ranks time out and end with 1
  replicatedJobs:
    - name: ranks
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {hosts}
          parallelism: {hosts}
{spec}"""
SPEC = """\
backoffLimit: 20
podFailurePolicy:
  rules:
    - action: Ignore
      onExitCodes:
        containerName: pipeline
        operator: In
        values: [75]
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    - action: FailJob
      onExitCodes:
        containerName: pipeline
        operator: NotIn
        values: [75]
template:
  spec:
    restartPolicy: Never
    terminationGracePeriodSeconds: 120  # for a checkpoint
{pod}
    containers:
      - name: pipeline
        image: {image}
{command}
{resources}
        volumeMounts:
          - name: store
            mountPath: /store
          - name: shared-memory
            mountPath: /dev/shm
    volumes:
      - name: store
        persistentVolumeClaim:
          claimName: {claim}  # one that outlives the pod
      - name: shared-memory  # ranks of a host speak through it; a pod has 64 MiB of it
        emptyDir:
          medium: Memory
"""
OF_HOST = """\
HOST_RANK=$JOB_COMPLETION_INDEX
MASTER_ADDR={name}-ranks-0-0.{name}
"""


def check(job: Job) -> None:
    """Refuse what Kubernetes cannot be asked for.

    Raises:
        UserError: Naming the setting.
    """
    options = job.options
    check_root(job)
    image = require("image", options.image, "none is named", "give one with this package in it")
    if not re.fullmatch(r"[\w.:/@-]+", image, re.ASCII):
        raise UserError("image", f"{one_line(image, 60)!r} is no image", "give NAME:TAG")
    why = "a pod that is taken away must leave its checkpoints somewhere"
    require("claim", options.claim, why, "give claim=NAME, a persistent volume claim")
    for key in ("claim", "queue", "priority"):
        check_name(key, getattr(options, key), LABEL, "name of Kubernetes'")
    if options.gpu is not None and not job.needs.on_gpu:
        raise UserError("gpu", "has no effect with hardware.device=cpu", "leave it out")
    check_name("gpu", options.gpu, RESOURCE, f"resource such as {GPU}")
    if options.node is not None and not re.fullmatch(NODE, options.node, re.ASCII):
        problem = f"{one_line(options.node, 60)!r} is no LABEL=VALUE"
        raise UserError("node", problem, "give e.g. node=cloud.google.com/gke-spot=true")
    if job.profile is Profile.spot and not (options.queue or options.priority or options.node):
        problem = "Kubernetes does not say which nodes can be taken away"
        remedy = "give node=LABEL=VALUE, queue=NAME or priority=NAME, or profile=reserved"
        raise UserError("profile", problem, remedy)


def text(job: Job) -> str:
    """Return the manifest."""
    queue = job.options.queue
    names = {
        "name": yaml_text(job.name),
        "hosts": job.needs.hosts,
        "labels": (
            ""
            if queue is None
            else f"\n  labels:\n    kueue.x-k8s.io/queue-name: {yaml_text(queue)}"
        ),
    }
    one = job.needs.hosts == 1
    spec = SPEC.format(
        pod=indent("\n".join(_pod(job)), "    "),
        image=yaml_text(job.options.image or ""),
        command=indent("\n".join(_command(job)), "        "),
        resources=indent("\n".join(_resources(job)), "        "),
        claim=yaml_text(job.options.claim or ""),
    )
    head = HEAD.format(what=job.what, command=job.command, file=job.file)
    return head + (JOB if one else JOBSET).format(
        **names, spec=indent(spec, "  " if one else "          ")
    )


def client(file: str) -> list[str]:
    """Return the command that hands the file to a cluster."""
    return ["kubectl", "apply", "-f", file]


def _pod(job: Job) -> list[str]:
    options, needs = job.options, job.needs
    lines: list[str] = []
    if needs.wall_seconds is None:
        lines.append("# no activeDeadlineSeconds: budget.wall_seconds=S says it")
    else:
        deadline = int(needs.wall_seconds) + PULLED_S
        lines.append(f"activeDeadlineSeconds: {deadline}  # {PULLED_S} of them to pull the image")
    if options.priority is not None:
        lines.append(f"priorityClassName: {yaml_text(options.priority)}")
    if options.node is not None:
        label, _, value = options.node.partition("=")
        label, value = yaml_text(label), f'"{value}"'
        lines += ["nodeSelector:", f"  {label}: {value}"]
        lines += ["tolerations:", f"  - key: {label}", "    operator: Equal", f"    value: {value}"]
    return lines


def _command(job: Job) -> list[str]:
    root = f"tracking.root={STORE}"
    # Kubernetes reads $(NAME) in commands, and $$ as a $
    settings = [word.replace("$", "$$") for word in (*job.settings, root)]
    if job.needs.hosts == 1:
        words = [*settings, f"hardware.devices={job.needs.devices}"]
        return ["command: [python, -m, pipeline]", "args:", *(f"  - {yaml_text(w)}" for w in words)]
    script = OF_HOST.format(name=job.name) + ranks_of_host(job, shell_words(settings))
    return ["command: [bash, -c]", "args:", "  - |", *indent(script, "    ").splitlines()]


def _resources(job: Job) -> list[str]:
    needs = job.needs
    gpus = [f"{job.options.gpu or GPU}: {needs.devices}"] if needs.on_gpu else []
    unsaid = [
        *(["# no cpu: cpus=N says it"] if needs.cpus is None else []),
        *(["# no memory: memory=GIB says it"] if needs.memory_gib is None else []),
    ]
    asked = [
        *([f"cpu: {needs.cpus * needs.devices}"] if needs.cpus is not None else []),
        *([f"memory: {needs.memory_gib}Gi"] if needs.memory_gib is not None else []),
    ]
    lines = [*(["limits:", *(f"  {line}" for line in gpus)] if gpus else [])]
    lines += [*(["requests:", *(f"  {line}" for line in asked)] if asked else [])]
    return ["resources:" if lines else "resources: {}", *(f"  {line}" for line in lines), *unsaid]
