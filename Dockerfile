# One image for CPU and GPU. CPU (the default), then CUDA:
#   docker build -t latentplan .
#   docker build -t latentplan --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# Any Debian or Ubuntu base with Python 3.11 or 3.12 in reach of apt will do; torch brings its own
# CUDA libraries, so NVIDIA's smallest base suffices. Pin BASE by digest where it must not move.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Ask the NVIDIA runtime for rendering beside computing, and tell the GL dispatcher of its EGL.
# Without a GPU neither has an effect, and Mesa renders in software.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN mkdir -p /usr/share/glvnd/egl_vendor.d \
    && echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
        > /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# The same scripts as tools/quickstart, so that continuous integration exercises them.
WORKDIR /opt/latentplan
COPY tools/common.sh tools/install-system tools/
RUN tools/install-system && rm -rf /var/lib/apt/lists/*

# What the packages' versions depend on comes first: a change of the code installs nothing anew.
ENV LATENTPLAN_VENV=/opt/venv \
    PIP_NO_CACHE_DIR=1
COPY setup.cfg pyproject.toml constraints.txt LICENSE ./
COPY tools/install-python tools/
COPY latentplan/__init__.py latentplan/
RUN tools/install-python plot,video
COPY . .

# The image also runs as any other user (docker run --user): home, caches and /runs are open to
# all, and USER names whoever has no entry in the password file. What was compiled stays with the
# runs: the next container need not spend its first minute on it.
RUN useradd --create-home --uid 10001 latentplan \
    && install -d -m 1777 /runs && chmod 1777 /home/latentplan
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/latentplan \
    USER=latentplan \
    TORCHINDUCTOR_CACHE_DIR=/runs/.torchinductor
USER latentplan
VOLUME /runs
# From here the default run folder, runs/..., is a folder of the volume.
WORKDIR /
# run.json names the commit that made a run; the image has no .git to ask.
ARG COMMIT
ENV LATENTPLAN_COMMIT=${COMMIT}
ENTRYPOINT ["latentplan"]
CMD ["--help"]
