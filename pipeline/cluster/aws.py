"""The AWS account of a cluster: what it lacks, and what `ray up` fills in from it.

`provider.module` of a cluster file names `Provider`. Ray calls it on the laptop before it starts anything. From then
on, and on the head, the provider is Ray's own `aws`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.config import PLACEHOLDER, make_token, node_groups, placeholders

MODULE = "pipeline.cluster.aws.Provider"
TEMPLATE = Path(__file__).resolve().parents[2] / "aws-account.yaml"
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""AWS's own parameter with the newest Deep Learning Base AMI of a region."""
QUOTAS = {"p": ("L-417A185B", "L-7212CCBC"), "g": ("L-DB2E81BA", "L-3819A6DF")}
"""First letter of an instance type -> codes of its quotas in vCPUs, on demand and spot (AWS Service Quotas, ec2)."""
STACK_WAIT_S = 1200.0
"""How long the stack may take."""
_OUTPUTS = ("Zone", "Subnet", "SecurityGroup", "PlacementGroup", "Bucket", "Volume", "HeadProfile", "WorkerProfile")
FILLED_IN = {f"<{name} of the stack>" for name in _OUTPUTS} | {"<Subnet of the zone>", "<newest image>", "<region>"}
"""Places of a cluster file that `fill_in` knows."""


class Provider:
    """Ray's provider `aws`, after what it needs of the account has been looked at, made and filled in.

    Only the two steps before a machine starts; the configuration that they return names Ray's provider.
    """

    @staticmethod
    def fillout_available_node_types_resources(config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with Ray's defaults for AWS, which it has for its own provider alone."""
        from ray import autoscaler

        defaults = Path(autoscaler.__file__).parent / "aws" / "defaults.yaml"
        return {**yaml.safe_load(defaults.read_text(encoding="utf-8")), **config}

    @staticmethod
    def bootstrap_config(config: dict[str, Any]) -> dict[str, Any]:
        """The configuration filled in, for Ray's provider `aws`. ClickException with one sentence if it cannot be."""
        import click
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        try:
            filled = fill_in(config)
            with _asking("for machines, key pair and security group"):
                return bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(filled))
        except ValueError as error:
            raise click.ClickException(str(error)) from None


class Account:
    """The account and region of a cluster file. Every method asks AWS; ValueError when it does not answer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        import boto3
        from botocore.exceptions import BotoCoreError

        self.config, self.cluster = config, str(config.get("cluster_name"))
        self.region = str(config["provider"].get("region"))
        self.private = bool(config["provider"].get("use_internal_ips"))
        try:
            self._session = boto3.Session(region_name=self.region)
            known = self._session.get_credentials()
        except BotoCoreError as error:  # a profile that does not exist
            raise ValueError(f"AWS credentials: {error}; set AWS_PROFILE to one of ~/.aws/config") from None
        if known is None:
            raise ValueError("there are no AWS credentials here; call `aws configure` or `aws sso login`")

    def client(self, service: str) -> Any:
        """boto3's client, which gives up soon."""
        from botocore.config import Config

        return self._session.client(service, config=Config(connect_timeout=10, retries={"total_max_attempts": 3}))

    def number(self) -> str:
        """The account's number; ValueError for credentials that AWS refuses."""
        with _asking("who you are; credentials may have expired (`aws sso login`), and provider.region must exist"):
            return str(self.client("sts").get_caller_identity()["Account"])

    def zones(self, *types: str) -> list[str]:
        """Zones of the region in which one of these instance types is offered."""
        with _asking(f"which zones of {self.region} have {' or '.join(types)}"):
            pages = self.client("ec2").get_paginator("describe_instance_type_offerings")
            found = pages.paginate(
                LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": list(types)}]
            )
            return sorted({offer["Location"] for page in found for offer in page["InstanceTypeOfferings"]})

    def quota(self, instance_type: str, *, spot: bool) -> tuple[str, str, float]:
        """(code, name, vCPUs) of the quota that an instance type counts against."""
        code = QUOTAS[instance_type[0]][spot]
        with _asking(f"for the quota of {instance_type}"):
            quota = self.client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]
            return code, str(quota["QuotaName"]), float(quota["Value"])

    def head(self) -> Mapping[str, Any] | None:
        """The cluster's head as EC2 describes it, if it runs or is starting."""
        filters = {"ray-cluster-name": self.cluster, "ray-node-type": "head"}
        with _asking("whether a head runs"):
            found = self.client("ec2").describe_instances(
                Filters=[
                    *({"Name": f"tag:{name}", "Values": [value]} for name, value in filters.items()),
                    {"Name": "instance-state-name", "Values": ["pending", "running"]},
                ]
            )["Reservations"]
        return next((instance for each in found for instance in each["Instances"]), None)

    def newest_image(self) -> str:
        """Id of AWS's newest image with NVIDIA's driver."""
        with _asking(f"for the newest image ({IMAGE}); name one instead of <newest image>"):
            return str(self.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"])

    def default_subnets(self) -> dict[str, str]:
        """Zone -> subnet of the region's default network."""
        with _asking("for the default network"):
            found = self.client("ec2").describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])
        return {subnet["AvailabilityZone"]: subnet["SubnetId"] for subnet in found["Subnets"]}

    def stack(self) -> dict[str, str] | None:
        """Outputs of the cluster's stack, waiting while it is being made; None if there is none."""
        from botocore.exceptions import ClientError

        end = time.monotonic() + STACK_WAIT_S
        with _asking(f"for the stack {self.cluster}"):
            client = self.client("cloudformation")
            while True:
                try:
                    (stack,) = client.describe_stacks(StackName=self.cluster)["Stacks"]
                except ClientError as error:
                    if "does not exist" in str(error):
                        return None
                    raise
                state = stack["StackStatus"]
                if state in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE"):
                    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}
                if not state.endswith("_IN_PROGRESS") or "ROLLBACK" in state or time.monotonic() > end:
                    break
                time.sleep(5)
            events = client.describe_stack_events(StackName=self.cluster)["StackEvents"]
        failed = [event for event in events if event["ResourceStatus"].endswith("_FAILED")]  # newest first
        why = f": {failed[-1]['LogicalResourceId']}: {failed[-1].get('ResourceStatusReason')}" if failed else ""
        raise ValueError(
            f"the stack {self.cluster} is {state}{why}; mend that, delete it (aws cloudformation delete-stack "
            f"--region {self.region} --stack-name {self.cluster}), and start again"
        )

    def make_stack(self, zone: str) -> dict[str, str]:
        """Make bucket, volume, rights, and the private network if the file asks for it; their names."""
        network = "private" if self.private else "default"
        what = "bucket, volume, rights and private network" if self.private else "bucket, volume and rights"
        print(f"making {what} in {zone} (CloudFormation stack {self.cluster}): some minutes, once", flush=True)
        with _asking(f"to make the stack {self.cluster} (who may not make roles has somebody else deploy it)"):
            self.client("cloudformation").create_stack(
                StackName=self.cluster,
                TemplateBody=TEMPLATE.read_text(encoding="utf-8"),
                Capabilities=["CAPABILITY_IAM"],
                Parameters=[
                    {"ParameterKey": "Zone", "ParameterValue": zone},
                    {"ParameterKey": "Network", "ParameterValue": network},
                ],
            )
        return self.stack() or {}


def look(account: Account) -> tuple[list[str], list[str]]:
    """(what the account lacks, what it has), one sentence each."""
    lacks, has = [], [f"account {account.number()}, region {account.region}"]
    types = account.config["available_node_types"]
    for group in node_groups(account.config):
        node = types[group.node_type]["node_config"]
        instance_type = str(node["InstanceType"])
        if zones := account.zones(instance_type):
            has.append(f"{instance_type} in {', '.join(zones)}")
        else:
            lacks.append(
                f"region {account.region} has no {instance_type}; name another in provider.region "
                "(us-east-1 and us-west-2 have p4d.24xlarge), or another instance type"
            )
        market = (node.get("InstanceMarketOptions") or {}).get("MarketType")
        if market == "capacity-block" or instance_type[0] not in QUOTAS or not group.gpus:
            continue
        try:
            code, name, vcpus = account.quota(instance_type, spot=market == "spot")
        except ValueError as error:
            has.append(str(error))
            continue
        has.append(f"quota {name!r}: {vcpus:.0f} vCPUs, {vcpus // group.cpus:.0f} of {group.count} {instance_type}")
        if vcpus < group.cpus:
            lacks.append(
                f"the quota {name!r} of {account.region} is {vcpus:.0f} vCPUs, and a {instance_type} has {group.cpus}; "
                f"ask for more, which takes AWS hours to days: aws service-quotas request-service-quota-increase "
                f"--region {account.region} --service-code ec2 --quota-code {code} --desired-value {group.cpus}"
            )
    return lacks, has


def fill_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """A cluster file with what stands in <angle brackets> filled in, for Ray's provider `aws`.

    Makes the stack of aws-account.yaml if it is not there. ValueError with what the file or the account lacks, before
    anything is made.
    """
    for place, text in placeholders(config):
        if text not in FILLED_IN:
            raise ValueError(f"{place}: fill in {text}")
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*", str(config.get("cluster_name"))):
        raise ValueError(f"cluster_name {config.get('cluster_name')!r} may have letters, digits and - only")
    make_token(config)
    account = Account(config)
    head = account.head()
    if head is None and (lacks := look(account)[0]):
        raise ValueError("; ".join(lacks))
    if head and "ssh_private_key" not in config["auth"]:  # Ray would make another key, and replace the head for it
        key = Path(f"~/.ssh/{head.get('KeyName')}.pem")
        if not key.expanduser().exists():
            raise ValueError(
                f"the head of {account.cluster} runs with a key that is not here; copy {key} from where it is"
            )
    asked = {text for _, text in placeholders(config)}
    types = config["available_node_types"].values()
    gpu_zones = account.zones(*(t["node_config"]["InstanceType"] for t in types if t["resources"].get("GPU")))
    subnets = {} if account.private else account.default_subnets()
    outputs = account.stack() or account.make_stack(_zone(account, gpu_zones, subnets))
    values = {f"<{name} of the stack>": value for name, value in outputs.items()}
    values["<region>"] = account.region
    zone = outputs["Zone"]
    if zone in subnets:
        values["<Subnet of the zone>"] = subnets[zone]
    if "<newest image>" in asked:  # another image would have Ray replace the head that runs
        values["<newest image>"] = head["ImageId"] if head else account.newest_image()
    if lacking := sorted(asked - values.keys()):
        raise ValueError(
            f"the stack {account.cluster} in {zone} gives no {', '.join(lacking)}: it was made for another network; "
            "choose another cluster_name"
        )
    filled: dict[str, Any] = _replaced(config, values)
    # the volume's zone first: machines beside the head
    zones = [zone] if account.private else [zone, *(each for each in gpu_zones if each != zone and each in subnets)]
    provider = {"availability_zone": ",".join(zones), **filled["provider"], "type": "aws"}
    provider.pop("module", None)
    return {**filled, "provider": provider}


def _zone(account: Account, gpu_zones: list[str], subnets: Mapping[str, str]) -> str:
    """The first zone for head, volume and GPUs; ValueError where there is none."""
    head = account.config["available_node_types"][account.config["head_node_type"]]["node_config"]["InstanceType"]
    both = [zone for zone in gpu_zones if zone in account.zones(head)]
    if not both:
        raise ValueError(f"no zone of {account.region} has GPU machines and {head}; name another type for the head")
    if account.private:
        return both[0]
    for zone in both:
        if zone in subnets:
            return zone
    raise ValueError(
        f"region {account.region} has no default network in {', '.join(both)}; make one "
        f"(aws ec2 create-default-vpc --region {account.region}), or use cluster.private.yaml"
    )


def _replaced(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda found: values[found.group()], value)
    if isinstance(value, Mapping):
        return {key: _replaced(entry, values) for key, entry in value.items()}
    return [_replaced(entry, values) for entry in value] if isinstance(value, list) else value


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """AWS's errors as one sentence."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise ValueError(f"AWS could not be asked {what}: {error}") from None
