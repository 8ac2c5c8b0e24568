# syntax=docker/dockerfile:1
# modeseek-ray for machines without a GPU:
#   docker build -f deploy/docker/cpu.Dockerfile -t modeseek-ray:0.1.0-cpu .
# One image for the service, Ray's head and Ray's workers: they have to agree on every version, and a
# job's entry point names the interpreter by its full path.
FROM python:3.11.14-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/modeseek
# Only what decides the environment, so that a change of the code does not install it anew.
COPY pyproject.toml README.md LICENSE ./
COPY modeseek_ray/__init__.py modeseek_ray/
COPY actors/__init__.py actors/
COPY deploy/setup.sh deploy/
COPY deploy/requirements deploy/requirements
RUN deploy/setup.sh cpu
COPY modeseek_ray modeseek_ray
COPY actors actors
RUN find . -name __pycache__ -prune -exec rm -rf {} +

FROM python:3.11.14-slim-bookworm
# wget is what KubeRay asks the health of Ray's processes with.
# No versions: Debian keeps only the newest of a release, so a pin would break the build within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp modeseek \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/modeseek
COPY --from=build /opt/modeseek /opt/modeseek
ENV PATH=/opt/modeseek/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MODESEEK_HOME=/var/lib/modeseek \
    RAY_AUTH_MODE=token \
    DS_ACCELERATOR=cpu \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /var/lib/modeseek
VOLUME /var/lib/modeseek
EXPOSE 8420
ENTRYPOINT ["tini", "--"]
CMD ["modeseek", "serve", "--host", "0.0.0.0"]
