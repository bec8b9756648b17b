# The Python environments of one system and accelerator: onewan and the wheels that
# python-packages.json names, around the PyTorch of nixpkgs.
#
# PyTorch comes from nixpkgs, because there it exists in builds for each accelerator. It is not
# changed: an override of any of its dependencies would compile it anew. pyproject.nix installs the
# wheels beside it instead of nixpkgs' own versions, most of which are older than onewan needs.
{
  lib,
  pkgs,
  pyproject-nix,
  # "cpu", "cuda" or "rocm", for which `pkgs` is configured.
  accelerator,
  # The folder of pyproject.toml.
  root,
}:
let
  inherit (pkgs.stdenv.hostPlatform) isLinux isx86_64 system;
  lock = lib.importJSON ./python-packages.json;
  python = pkgs."python${lib.replaceStrings [ "." ] [ "" ] lock.python}";
  # PyTorch's own CUDA build needs no compiling; nixpkgs has it for x86_64 only.
  torch =
    if accelerator == "cuda" && isx86_64 then python.pkgs.torch-bin else python.pkgs.torch;
  hacks = pkgs.callPackage pyproject-nix.build.hacks { };
  inherit (pyproject-nix.build.lib) renderers;
  withoutExtras = names: lib.genAttrs names (_: [ ]);

  # The address of a wheel follows from its file name, NAME-VERSION-PYTHON-ABI-PLATFORM.whl.
  fetchWheel =
    { file, sha256 }:
    let
      part = builtins.elemAt (lib.splitString "-" (lib.removeSuffix ".whl" file));
    in
    pkgs.fetchPypi {
      pname = part 0;
      version = part 1;
      dist = part 2;
      python = part 2;
      abi = part 3;
      platform = part 4;
      format = "wheel";
      inherit sha256;
    };

  # What wheels of compiled code need beyond the usual libraries of Linux.
  corrections = {
    # Both find the libraries of CUDA or ROCm that PyTorch has loaded, and have parts for others.
    bitsandbytes.autoPatchelfIgnoreMissingDeps = true;
    torchao.autoPatchelfIgnoreMissingDeps = true;
    opencv-python.buildInputs = [ pkgs.libxcb ];
  };

  wheelPackage =
    name:
    {
      version,
      dependencies,
      extras,
      wheels,
    }:
    { stdenv, pyprojectWheelHook }:
    let
      isPure = wheels ? any;
      correction = lib.optionalAttrs isLinux (corrections.${name} or { });
    in
    stdenv.mkDerivation (
      {
        pname = name;
        inherit version;
        src = fetchWheel (wheels.any or wheels.${system});
        dontStrip = true;
        passthru = {
          inherit dependencies;
          optional-dependencies = extras;
        };
      }
      // correction
      // {
        nativeBuildInputs = [
          pyprojectWheelHook
        ]
        ++ lib.optional (isLinux && !isPure) pkgs.autoPatchelfHook;
        buildInputs =
          lib.optionals (isLinux && !isPure) pkgs.pythonManylinuxPackages.manylinux2014
          ++ correction.buildInputs or [ ];
      }
    );

  # Triton, which `memory.compile` needs, in the build that belongs to this PyTorch.
  tritons = lib.filter (package: lib.hasPrefix "triton" (lib.getName package)) (
    torch.propagatedBuildInputs or [ ]
  );
  fromNixpkgs = {
    torch = hacks.nixpkgsPrebuilt {
      from = torch;
      prev.passthru.dependencies = withoutExtras (
        lock.torch ++ lib.optional (tritons != [ ]) "triton"
      );
    };
  }
  // lib.optionalAttrs (tritons != [ ]) {
    triton = hacks.nixpkgsPrebuilt { from = lib.head tritons; };
  };

  project = pyproject-nix.lib.project.loadPyproject { projectRoot = root; };
  environ = pyproject-nix.lib.pep508.mkEnviron python;
  # Only what onewan's wheel is made of, so that a change of a test builds nothing anew.
  src = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.unions [
      (root + "/src")
      (root + "/docs")
      (root + "/pyproject.toml")
      (root + "/README.md")
      (root + "/LICENSE")
    ];
  };
  onewan =
    { stdenv, pyprojectHook, resolveBuildSystem }:
    stdenv.mkDerivation (
      renderers.mkDerivation { inherit project environ; } {
        inherit pyprojectHook resolveBuildSystem;
      }
      // {
        inherit src;
      }
    );
  # Imports src/ of the checkout that REPO_ROOT names when Python starts.
  editableOnewan =
    { stdenv, pyprojectEditableHook, resolveBuildSystem }:
    let
      rendered =
        renderers.mkDerivationEditable
          {
            inherit project environ;
            root = "$REPO_ROOT";
          }
          {
            inherit pyprojectEditableHook resolveBuildSystem;
          };
    in
    stdenv.mkDerivation (
      rendered
      // {
        inherit src;
        nativeBuildInputs = rendered.nativeBuildInputs ++ resolveBuildSystem { editables = [ ]; };
      }
    );

  packagesWith =
    ownPackage:
    (pkgs.callPackage pyproject-nix.build.packages { inherit python; }).overrideScope (
      final: _previous:
      lib.mapAttrs (name: entry: final.callPackage (wheelPackage name entry) { }) lock.packages
      // fromNixpkgs
      // {
        onewan = final.callPackage ownPackage { };
      }
    );
in
{
  inherit (project.pyproject.project) version;
  # onewan with all that a run file can ask for.
  users = (packagesWith onewan).mkVirtualEnv "onewan-environment" {
    onewan = [ "all" ];
  };
  # onewan with what its tests need.
  tests = (packagesWith onewan).mkVirtualEnv "onewan-test-environment" { onewan = [ "dev" ]; };
  # The same, with onewan imported from the checkout.
  editable = (packagesWith editableOnewan).mkVirtualEnv "onewan-development-environment" {
    onewan = [ "dev" ];
  };
}
