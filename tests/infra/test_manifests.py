"""The Kubernetes manifests: they fit KubeRay's schemas, name what exists, and keep what infra/README.md promises."""

import copy
import ipaddress
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from tests.infra import commands, crds
from tests.infra.rendering import INFRA, K8S, ROOT, Object, clusters, containers, folders, load, mappings, pods, render

GPU = K8S / "overlays" / "gpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_MAX_RAYJOB_NAME = 47  # KubeRay's


def _name(folder: Path) -> str:
    return str(folder.relative_to(K8S))


@pytest.fixture(params=folders(), ids=_name)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each folder that can be applied."""
    return request.param


@pytest.fixture
def objects(folder: Path) -> list[Object]:
    """What it renders to."""
    return render(folder)


@pytest.fixture(scope="module")
def everything() -> list[Object]:
    """What all folders render to."""
    return [an_object for folder in folders() for an_object in render(folder)]


def _jobs(objects: list[Object]) -> list[Object]:
    """Specs of RayJobs, those of schedules included."""
    kinds = {"RayJob": lambda o: o["spec"], "RayCronJob": lambda o: o["spec"]["jobTemplate"]}
    return [kinds[o["kind"]](o) for o in objects if o["kind"] in kinds]


def test_every_yaml_file_parses_and_belongs_to_a_folder_that_can_be_applied() -> None:
    named = {
        (folder / name).resolve()
        for folder in folders()
        for name in load(folder / "kustomization.yaml")[0]["resources"]
    }
    for path in K8S.rglob("*.yaml"):
        assert load(path)
        assert path.name == "kustomization.yaml" or path in named, f"nothing names {path}"


def test_kuberay_objects_have_the_fields_of_their_schema_and_no_others(objects: list[Object]) -> None:
    assert [problem for o in objects if crds.is_kuberay(o) for problem in crds.problems(o)] == []


def test_kubectl_renders_what_is_tested_here(folder: Path, objects: list[Object]) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl to compare with")
    text = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout

    def by_name(found: list[Object]) -> dict[tuple[str, str], Object]:
        return {(o["kind"], o["metadata"]["name"]): o for o in found}

    assert by_name(list(yaml.safe_load_all(text))) == by_name(objects)


def test_a_field_that_the_schema_does_not_know_is_found_at_any_depth() -> None:
    (job,) = render(K8S / "job")
    assert crds.problems(job) == []
    for path in (
        (),
        ("submitterPodTemplate", "spec"),
        ("rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0),
    ):
        wrong = copy.deepcopy(job)
        node: Any = wrong["spec"]
        for step in path:
            node = node[step]
        node["noSuchField"] = 1
        assert len(crds.problems(wrong)) == 1
    wrong = copy.deepcopy(job)
    wrong["spec"]["backoffLimit"] = "0"
    assert "'0' is not of type 'integer'" in crds.problems(wrong)[0]


def test_a_patch_without_a_target_and_an_unknown_part_of_a_kustomization_are_refused(tmp_path: Path) -> None:
    start = "resources: [x.yaml]\n"
    (tmp_path / "x.yaml").write_text("{kind: A, metadata: {name: a}}")
    for rest, said in (
        ("patches: [{target: {kind: A, name: b}, patch: '[]'}]", "to patch"),
        ("replacements: []", "is not rendered here"),
        ("patches: [{target: {kind: A, name: a}, patch: '[{op: replace, path: /spec, value: 1}]'}]", "spec"),
    ):
        (tmp_path / "kustomization.yaml").write_text(start + rest)
        with pytest.raises((AssertionError, KeyError), match=said):
            render(tmp_path)


def test_rayjobs_bring_the_cluster_that_stays() -> None:
    (cluster,) = load(K8S / "base" / "cluster.yaml")
    (job,) = load(K8S / "job" / "rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_both_schedules_start_the_run_that_can_be_started_by_hand() -> None:
    (run,) = render(GPU / "run")
    (cron,) = render(GPU / "raycronjob")
    assert cron["spec"]["jobTemplate"] == run["spec"]
    (template,) = [o for o in render(GPU / "schedule") if o["kind"] == "RayJob"]
    assert template["spec"] == run["spec"] | {"suspend": True}


def test_there_is_a_rayjob_for_each_verb_whose_command_the_verb_understands() -> None:
    for verb in cli.VERBS:
        (job,) = render(GPU / verb)
        assert job["metadata"]["name"] == f"ganymede-{verb}"
        entrypoint = shlex.split(job["spec"]["entrypoint"])
        assert entrypoint[3:6] == ["python", "-m", f"jobs.{verb}"]
    for folder in [GPU / verb for verb in cli.VERBS] + [
        GPU / "schedule",
        GPU / "raycronjob",
        K8S / "overlays/cpu-kind/run",
    ]:
        for job in _jobs(render(folder)):
            commands.resolved(job["entrypoint"])


def test_a_command_that_a_verb_does_not_understand_is_found() -> None:
    with pytest.raises(AssertionError, match="unknown flag"):
        commands.resolved("python -m jobs.gc --dataset x --no-such-flag")
    with pytest.raises(AssertionError, match="must be given"):
        commands.resolved("python x/infra/retry.py -- python -m jobs.gc")


def test_exit_codes_2_and_3_are_not_repeated(objects: list[Object]) -> None:
    for job in _jobs(objects):
        assert shlex.split(job["entrypoint"])[:3] == commands.RETRY
        assert job["backoffLimit"] == 0
        assert job["submissionMode"] == "K8sJobMode"
        assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_pods_are_unprivileged_read_only_and_bounded(objects: list[Object]) -> None:
    for pod in (pod for o in objects for pod in pods(o)):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert isinstance(pod["automountServiceAccountToken"], bool)
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(set(volume) == {"name", "emptyDir"} for volume in pod.get("volumes", []))
    for container in _containers_and_autoscalers(objects):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        for side in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][side])


def test_ray_may_write_where_it_must_though_its_root_is_read_only(objects: list[Object]) -> None:
    for pod in (pod for o in objects for pod in pods(o)):
        if pod["containers"][0]["name"] != "start":
            volumes = {volume["name"] for volume in pod["volumes"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert set(mounts) == {"/tmp", "/home/ganymede"}
            assert set(mounts.values()) <= volumes


def test_only_heads_and_the_schedule_have_a_kubernetes_token(objects: list[Object]) -> None:
    for pod in (pod for o in objects for pod in pods(o)):
        may = pod["serviceAccountName"] in ("ganymede-head", "ganymede-schedule")
        assert pod["automountServiceAccountToken"] == may


def test_service_accounts_exist(everything: list[Object]) -> None:
    accounts = {o["metadata"]["name"]: o for o in everything if o["kind"] == "ServiceAccount"}
    assert {pod["serviceAccountName"] for o in everything for pod in pods(o)} == set(accounts)
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())


def _containers_and_autoscalers(objects: list[Object]) -> list[Object]:
    return [*(c for o in objects for c in containers(o)), *(spec["autoscalerOptions"] for _, spec in clusters(objects))]


def test_images_are_those_that_the_dockerfile_builds_of_this_version(everything: list[Object]) -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    known = {f"ganymede:{PROJECT['version']}-{target}" for target in ("cpu", "gpu")}
    assert {"cpu", "gpu"} <= set(stages)
    found = {container["image"] for o in everything for container in containers(o)}
    assert {image.removeprefix("registry.example/") for image in found} == known


def test_gpu_overlays_name_the_registry_everywhere() -> None:
    for folder in folders():
        if GPU in (folder, *folder.parents):
            for container in (c for o in render(folder) for c in containers(o)):
                assert container["image"].startswith("registry.example/")


def test_ray_is_the_version_that_the_project_pins(everything: list[Object]) -> None:
    (pin,) = [re.fullmatch(r"ray\[.*\]==(\S+)", line) for line in PROJECT["dependencies"] if line.startswith("ray[")]
    assert pin is not None
    assert {spec["rayVersion"] for _, spec in clusters(everything)} == {pin[1]}


def test_paths_in_the_image_exist_in_the_repository_and_are_copied_there() -> None:
    copied = re.findall(r"^COPY (.+) /opt/ganymede/infra/$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)[
        0
    ].split()
    named = {path for file in K8S.rglob("*.yaml") for path in re.findall(r"/opt/ganymede/([\w./-]+)", file.read_text())}
    assert named == {"infra/retry.py", "infra/start_rayjob.py", "infra/drain.sh"}
    for path in named:
        assert (ROOT / path).is_file()
        assert path in copied


def test_clusters_ask_for_a_token_and_are_not_reachable_from_outside(objects: list[Object]) -> None:
    for _, spec in clusters(objects):
        assert spec["authOptions"] == {"mode": "token", "secretName": "ganymede-ray-token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {"Service", "Ingress", "Gateway", "HTTPRoute"} & {o["kind"] for o in objects}


def test_no_secret_is_written_down(everything: list[Object]) -> None:
    assert "Secret" not in {o["kind"] for o in everything}
    for mapping in (m for o in everything for m in mappings(o)):
        for variable in mapping.get("env", []):
            if re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]):
                assert "value" not in variable
    secrets = {m["secretRef"]["name"] for o in everything for m in mappings(o) if "secretRef" in m} | {
        "ganymede-ray-token"
    }
    assert set(re.findall(r"create secret generic (\S+) ", (INFRA / "README.md").read_text())) == secrets
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|-----BEGIN|[\s=:]['\"]?[0-9a-f]{40,}['\"]?\s*$", path.read_text(), re.MULTILINE
            )


def test_the_head_does_no_work_and_workers_are_of_three_kinds() -> None:
    for name, spec in clusters([*render(K8S / "base"), *(o for verb in cli.VERBS for o in render(GPU / verb))]):
        head = spec["headGroupSpec"]["rayStartParams"]
        assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        cpu, on_demand, spot = spec["workerGroupSpecs"]
        assert [group["groupName"] for group in (cpu, on_demand, spot)] == ["cpu-ingest", "gpu-on-demand", "gpu-spot"]
        for group in (cpu, on_demand, spot):
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
            assert ("nvidia.com/gpu" in _resources(group)) == (group is not cpu)
        assert spot["priority"] > on_demand["priority"]
        assert on_demand["template"]["spec"]["nodeSelector"] != spot["template"]["spec"]["nodeSelector"]


def _resources(group: Object) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    return container["resources"]["limits"]


def test_requests_equal_limits_where_ray_counts_them(objects: list[Object]) -> None:
    for _, spec in clusters(objects):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_spot_pods_have_time_to_say_that_they_go(everything: list[Object]) -> None:
    seen = 0
    for _, spec in clusters(everything):
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            hook = pod["containers"][0].get("lifecycle")
            assert (hook is not None) == (group["groupName"] == "gpu-spot")
            if hook:
                seconds = int(hook["preStop"]["exec"]["command"][2])
                assert 20 + seconds < pod["terminationGracePeriodSeconds"] < 120  # AWS gives two minutes
                seen += 1
    assert seen


def test_jobs_begin_with_the_gpus_that_their_command_counts() -> None:
    for verb in cli.VERBS:
        (job,) = render(GPU / verb)
        config = commands.resolved(job["spec"]["entrypoint"])
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1:]
        at_start, at_most = (sum(group[key] for group in groups) for key in ("replicas", "maxReplicas"))
        assert all(group["replicas"] == group["minReplicas"] for group in groups)
        workers = getattr(config, "workers", None)
        wants = workers.use_gpu if workers else getattr(config, "use_gpu", False)
        assert (at_start > 0) == wants, verb
        if wants and workers:
            assert workers.num_workers[0] <= at_start
            assert workers.num_workers[-1] <= min(at_most, config.train.num_lanes)


def test_nothing_passes_but_what_a_policy_names(everything: list[Object]) -> None:
    policies = {o["metadata"]["name"]: o["spec"] for o in everything if o["kind"] == "NetworkPolicy"}
    deny = policies["default-deny"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        directions = {direction.capitalize() for direction in ("ingress", "egress") if direction in policy}
        assert name == "default-deny" or directions == set(policy["policyTypes"])
        for rule in policy.get("ingress", []):
            assert rule["from"], f"{name} lets anybody in"
            assert all(peer.get("podSelector") or peer.get("namespaceSelector") for peer in rule["from"])
        for rule in policy.get("egress", []):
            assert rule.get("ports") or name == "ray-nodes"
            assert rule.get("to") or name in ("head-autoscaler", "schedule")
            for block in (peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer):
                metadata = ipaddress.ip_address("169.254.169.254")
                assert any(metadata in ipaddress.ip_network(cidr) for cidr in block["except"])


def test_policies_select_labels_that_pods_have(everything: list[Object]) -> None:
    labels = {
        (key, value)
        for o in everything
        for m in mappings(o)
        if "labels" in m and "name" not in m
        for key, value in m["labels"].items()
    }
    operators = {("ray.io/is-ray-node", "yes"), ("ray.io/node-type", "head"), ("k8s-app", "kube-dns")}
    for o in everything:
        if o["kind"] == "NetworkPolicy":
            for selector in (m["podSelector"] for m in mappings(o) if "podSelector" in m):
                assert set(selector.get("matchLabels", {}).items()) <= labels | operators


def test_the_cronjob_starts_one_run_at_a_time_and_stops_at_2_and_3() -> None:
    objects = render(GPU / "schedule")
    (cron,) = [o for o in objects if o["kind"] == "CronJob"]
    (template,) = [o for o in objects if o["kind"] == "RayJob"]
    spec, job = cron["spec"], cron["spec"]["jobTemplate"]["spec"]
    assert cron["apiVersion"] == "batch/v1"
    assert spec["concurrencyPolicy"] == "Forbid"
    assert re.fullmatch(r"\S+( \S+){4}", spec["schedule"])
    (container,) = job["template"]["spec"]["containers"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    fail = job["podFailurePolicy"]["rules"][0]
    assert fail == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2, 3]},
    }
    arguments = container["args"]
    assert arguments[arguments.index("--template") + 1] == template["metadata"]["name"]
    assert template["spec"]["suspend"] is True
    script = (INFRA / "start_rayjob.py").read_text()
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'add_argument("{flag}"' in script
    for name in re.findall(r"\$\((\w+)\)", " ".join(arguments)):
        assert name in {variable["name"] for variable in container["env"]}
    assert len(f"{cron['metadata']['name']}-{2**31 // 60}-ray") <= _MAX_RAYJOB_NAME


def test_the_schedule_may_read_and_create_rayjobs_and_nothing_else() -> None:
    objects = {o["kind"]: o for o in render(GPU / "schedule") if o["kind"] in ("Role", "RoleBinding", "CronJob")}
    role, binding = objects["Role"], objects["RoleBinding"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "list", "create"]}]
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": role["metadata"]["name"],
    }
    (subject,) = binding["subjects"]
    pod = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", pod["serviceAccountName"])


def test_names_are_what_kubernetes_and_kuberay_take(everything: list[Object]) -> None:
    versions = {
        "Namespace": "v1", "ServiceAccount": "v1", "NetworkPolicy": "networking.k8s.io/v1", "CronJob": "batch/v1",
        "Role": "rbac.authorization.k8s.io/v1", "RoleBinding": "rbac.authorization.k8s.io/v1",
        "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "RayCronJob": "ray.io/v1",
    }  # fmt: skip
    for o in everything:
        assert o["apiVersion"] == versions[o["kind"]]
        name = o["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert o["kind"] != "RayJob" or len(name) <= _MAX_RAYJOB_NAME
        assert o["kind"] == "Namespace" or o["metadata"]["namespace"] == "ganymede"
