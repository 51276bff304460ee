"""`ray up` of the AWS files in an account that moto plays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from pipeline.cluster.aws import IMAGE, TEMPLATE, Account, Provider, fill_in, look
from pipeline.cluster.config import placeholders, read_cluster_file
from tests.helpers.aws_account import AwsAccount, aws_account
from tests.helpers.shared import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsAccount]:
    with aws_account(tmp_path / "home", monkeypatch) as account:
        monkeypatch.chdir(PROJECT)
        yield account


def test_ray_up_of_the_file_as_it_comes_needs_an_empty_account_and_nothing_else(aws: AwsAccount) -> None:
    code, output = aws.ray("up", "--yes", "--no-config-cache", "cluster.yaml")
    assert code == 0, output
    assert "making bucket, volume and rights in us-east-1a (CloudFormation stack m2f)" in output
    (head,) = aws.machines()
    assert (head["InstanceType"], head["ImageId"], head["KeyName"]) == ("m6i.2xlarge", aws.image, "m2f")
    assert (aws.folder / ".ssh" / "m2f.pem").stat().st_mode & 0o777 == 0o600
    assert (aws.folder / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert "HeadProfile" in head["IamInstanceProfile"]["Arn"]
    (volume,) = aws.client("ec2").describe_volumes(Filters=[{"Name": "size", "Values": ["50"]}])["Volumes"]
    assert volume["AvailabilityZone"] == head["Placement"]["AvailabilityZone"] == "us-east-1a"
    (bucket,) = (each["Name"] for each in aws.client("s3").list_buckets()["Buckets"])
    # what the head is told: storage, volume, and how to start the others
    assert f"M2F_STORAGE=s3://{bucket}/m2f " in aws.calls()
    assert f"--volume-id {volume['VolumeId']} " in aws.calls()
    assert "ray start --head" in aws.calls() and "tracking_server.sh" in aws.calls()
    told = yaml.safe_load((aws.folder / "bootstrap.yaml").read_text())
    assert list(placeholders(told)) == [] and told["provider"]["type"] == "aws" and "module" not in told["provider"]
    assert told["available_node_types"]["p4d_24xlarge"]["resources"]["accelerator_type:A100"] == 1
    machines = _started(told)
    assert {name: machine["InstanceType"] for name, machine in machines.items()} == {
        "p4d_24xlarge": "p4d.24xlarge",
        "p4de_24xlarge": "p4de.24xlarge",
    }
    for machine in machines.values():  # beside the head, in its group, with the bucket's rights alone
        assert machine["Placement"]["AvailabilityZone"] == "us-east-1a"
        assert machine["SecurityGroups"] == head["SecurityGroups"]
        assert "WorkerProfile" in machine["IamInstanceProfile"]["Arn"]


def _started(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Start a machine of every type but the head's, as the autoscaler on the head does."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    found = {}
    for name, entry in config["available_node_types"].items():
        if name != config["head_node_type"]:
            (machine,) = provider.create_node(entry["node_config"], {"ray-node-type": "worker"}, 1).values()
            found[name] = provider.ec2.meta.client.describe_instances(InstanceIds=[machine.id])["Reservations"][0][
                "Instances"
            ][0]
    return found


def test_a_newer_image_a_lower_quota_or_another_laptop_leaves_a_running_head_alone(aws: AwsAccount) -> None:
    config = read_cluster_file("cluster.yaml")
    first = fill_in(config)
    node = first["available_node_types"]["head"]["node_config"]
    tags = [{"Key": "ray-cluster-name", "Value": "m2f"}, {"Key": "ray-node-type", "Value": "head"}]
    aws.client("ec2").run_instances(
        ImageId=node["ImageId"], MinCount=1, MaxCount=1, KeyName="m2f",
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )  # fmt: skip
    with pytest.raises(ValueError, match="the head of m2f runs with a key that is not here; copy ~/.ssh/m2f.pem from"):
        fill_in(config)
    (aws.folder / ".ssh").mkdir()
    (aws.folder / ".ssh" / "m2f.pem").touch()
    _newest(aws, "ami-newer")
    aws.vcpus = 0
    assert fill_in(config) == first  # Ray replaces a head whose configuration is another


def _newest(aws: AwsAccount, image: str) -> None:
    from moto.ssm.models import ssm_backends

    ssm_backends["123456789012"]["us-east-1"]._parameters[IMAGE][-1].value = image
    assert Account(read_cluster_file("cluster.yaml")).newest_image() == image


def test_what_the_account_lacks_is_one_sentence_and_nothing_is_made(
    aws: AwsAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**changes: Any) -> str:
        config = read_cluster_file("cluster.yaml")
        for path, value in changes.items():
            *keys, last = path.split("__")
            inner = config
            for key in keys:
                inner = inner[key]
            inner[last] = value
        with pytest.raises(click.ClickException) as refusal:
            Provider.bootstrap_config(config)
        return refusal.value.message

    aws.vcpus = 32
    code, output = aws.ray("up", "--yes", "--no-config-cache", "cluster.yaml")
    assert code == 1 and output.endswith(f"Error: {refused()}\n") and "Traceback" not in output
    assert refused() == (
        "the quota 'Running On-Demand P instances' of us-east-1 is 32 vCPUs, and a p4d.24xlarge has 96; ask for more, "
        "which takes AWS hours to days: aws service-quotas request-service-quota-increase --region us-east-1 "
        "--service-code ec2 --quota-code L-417A185B --desired-value 96"
    )
    spot = {"available_node_types__p4d_24xlarge__node_config__InstanceMarketOptions": {"MarketType": "spot"}}
    assert refused(**spot).startswith("the quota 'All P Spot Instance Requests' of us-east-1 is 32 vCPUs")
    aws.vcpus = 96
    assert refused(provider__region="eu-west-3") == (
        "region eu-west-3 has no p4d.24xlarge; name another in provider.region (us-east-1 and us-west-2 have "
        "p4d.24xlarge), or another instance type"
    )
    assert refused(setup_commands=["echo <your name>"]) == "setup_commands[0]: fill in <your name>"
    assert refused(cluster_name="m_2") == "cluster_name 'm_2' may have letters, digits and - only"
    for subnet in aws.client("ec2").describe_subnets()["Subnets"]:
        aws.client("ec2").delete_subnet(SubnetId=subnet["SubnetId"])
    assert refused().startswith("region us-east-1 has no default network in us-east-1a, us-east-1b")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert refused() == "there are no AWS credentials here; call `aws configure` or `aws sso login`"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    assert aws.client("cloudformation").list_stacks()["StackSummaries"] == [] and aws.machines() == []
    assert not (aws.folder / ".ssh").exists()


def test_what_the_account_has_is_named(aws: AwsAccount) -> None:
    aws.vcpus = 200
    lacks, has = look(Account(read_cluster_file("cluster.yaml")))
    assert lacks == []
    assert has == [
        "account 123456789012, region us-east-1",
        "p4d.24xlarge in us-east-1a, us-east-1b, us-east-1c, us-east-1d",
        "quota 'Running On-Demand P instances': 200 vCPUs, 2 of 4 p4d.24xlarge",
    ]


def test_a_quota_that_may_not_be_asked_for_is_said_and_stops_nothing(
    aws: AwsAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.servicequotas.exceptions import NoSuchResource
    from moto.servicequotas.models import ServiceQuotasBackend

    def unknown(self: object, service_code: str, quota_code: str) -> None:
        raise NoSuchResource

    monkeypatch.setattr(ServiceQuotasBackend, "get_service_quota", unknown)
    lacks, has = look(Account(read_cluster_file(PROJECT / "cluster.yaml")))
    assert lacks == [] and "AWS could not be asked for the quota of p4d.24xlarge: " in has[-1]


def test_the_private_file_takes_everything_from_the_stack(aws: AwsAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    # moto makes no placement group of a stack, so the stack's outputs are these
    subnet = aws.client("ec2").describe_subnets()["Subnets"][0]
    group = aws.client("ec2").create_security_group(GroupName="m2f", Description="-", VpcId=subnet["VpcId"])["GroupId"]
    profile = aws.client("iam").create_instance_profile(InstanceProfileName="m2f")["InstanceProfile"]["Arn"]
    outputs = {
        "Zone": subnet["AvailabilityZone"], "Subnet": subnet["SubnetId"], "SecurityGroup": group,
        "PlacementGroup": "m2f", "Bucket": "bucket", "Volume": "vol-1",
        "HeadProfile": profile, "WorkerProfile": profile,
    }  # fmt: skip
    assert {*outputs} == {*yaml.load(TEMPLATE.read_text(), _AnyTag)["Outputs"]}
    monkeypatch.setattr(Account, "stack", lambda self: outputs)
    config = prepare_config(read_cluster_file("cluster.private.yaml"))
    told = Provider.bootstrap_config(Provider.fillout_available_node_types_resources(config))
    assert list(placeholders(told)) == [] and told["provider"]["availability_zone"] == subnet["AvailabilityZone"]
    assert {*_started(told)} == {"p4d_24xlarge", "p4de_24xlarge"}
    card = told["available_node_types"]["p4d_24xlarge"]["node_config"]["NetworkInterfaces"][0]
    assert (card["SubnetId"], card["Groups"]) == (subnet["SubnetId"], [group])


def test_a_stack_of_the_default_network_does_not_do_for_the_private_file(
    aws: AwsAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"Zone": "us-east-1a", "Bucket": "b", "Volume": "v", "HeadProfile": "h", "WorkerProfile": "w"}
    monkeypatch.setattr(Account, "stack", lambda self: made)
    with pytest.raises(ValueError, match="m2f-private in us-east-1a gives no <PlacementGroup .*another cluster"):
        fill_in(read_cluster_file("cluster.private.yaml"))


def test_a_stack_that_failed_is_named(aws: AwsAccount) -> None:
    from moto.cloudformation.models import cloudformation_backends

    config = read_cluster_file("cluster.yaml")
    fill_in(config)

    (stack,) = cloudformation_backends["123456789012"]["us-east-1"].stacks.values()
    stack.status = "ROLLBACK_COMPLETE"
    with pytest.raises(ValueError, match="the stack m2f is ROLLBACK_COMPLETE.*aws cloudformation delete-stack"):
        fill_in(config)


class _AnyTag(yaml.SafeLoader):
    """CloudFormation's short forms are of no interest here."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)
