//! Images, with the real tool.

use std::os::unix::fs::MetadataExt;

use tokio::io::AsyncReadExt;

use super::*;
use crate::image::{ImageError, image_create, image_facts, read_content};

#[tokio::test]
async fn an_image_is_made_and_described() {
    let folder = folder();
    let tool = image_tool();
    let user = nobody().map(|user| user.uid);
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let path = folder.path().join(format!("new, with a comma.{}", format.as_str()));
        image_create(&tool, &path, format, 3 << 20).await.expect("an image");
        let owner = std::fs::metadata(&path).expect("an image").uid();
        assert!(user.is_none_or(|user| user == owner), "made as {owner}");
        let facts = image_facts(&tool, &path, format).await.expect("facts");
        assert_eq!((facts.virtual_size, facts.backing), (3 << 20, None));
    }
}

#[tokio::test]
async fn what_an_image_keeps_inside_is_named() {
    let folder = folder();
    // As the agent's user: it is made and changed here.
    let tool = ImageTool { user: None, ..image_tool() };
    let path = folder.path().join("kept.qcow2");
    image_create(&tool, &path, ImageFormat::Qcow2, 1 << 20).await.expect("an image");
    for arguments in [&["bitmap", "--add"][..], &["snapshot", "-c", "monday"]] {
        let mut command = Command::new(&tool.program);
        command.args(arguments).arg(&path);
        if arguments[0] == "bitmap" {
            command.arg("backup");
        }
        assert!(command.status().expect("qemu-img").success(), "{arguments:?}");
    }
    let facts = image_facts(&tool, &path, ImageFormat::Qcow2).await.expect("facts");
    assert_eq!(
        (&facts.snapshots[..], &facts.bitmaps[..]),
        (&["monday".to_owned()][..], &["backup".to_owned()][..])
    );
}

/// Scenario: images name other files of the host, as a stranger's may.
#[tokio::test]
async fn images_that_name_other_files_are_noticed() {
    let folder = folder();
    let tool = image_tool();
    let make = |name: &str, options: &str| {
        let path = folder.path().join(name);
        let made = Command::new(&tool.program)
            .args(["create", "-q", "-f", "qcow2", "-u"])
            .args(options.split(' '))
            .arg(&path)
            .arg("1M")
            .status();
        assert!(made.expect("qemu-img (Debian: qemu-utils)").success());
        path
    };
    let path = make("backed", "-b /etc/shadow -F raw");
    let facts = image_facts(&tool, &path, ImageFormat::Qcow2).await.expect("facts");
    assert_eq!(facts.backing.as_deref(), Some("/etc/shadow"));
    let as_raw = image_facts(&tool, &path, ImageFormat::Raw).await.expect("facts");
    assert_eq!(as_raw.backing, None, "what a guest wrote is not believed");

    let data = folder.path().join("data");
    let path = make("outside", &format!("-o data_file={}", data.display()));
    let refused = image_facts(&tool, &path, ImageFormat::Qcow2).await;
    assert!(matches!(refused, Err(ImageError::DataFile { .. })), "{refused:?}");
    let relative = image_facts(&tool, Path::new("nbd:host:1"), ImageFormat::Raw).await;
    assert!(matches!(relative, Err(ImageError::Relative { .. })), "{relative:?}");
    if tool.user.is_some() {
        let closed = folder.path().join("closed");
        std::fs::write(&closed, "a secret").expect("a file");
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&closed, mode).expect("its permissions");
        let refused = image_facts(&tool, &closed, ImageFormat::Raw).await;
        assert!(matches!(refused, Err(ImageError::Closed { .. })), "{refused:?}");
    }
    let absent = image_facts(&tool, Path::new("/no/such/image"), ImageFormat::Raw).await;
    assert!(matches!(absent, Err(ImageError::Refused { .. })), "{absent:?}");
}

/// Scenario: a disk is read as the guest sees it, while nobody or a QEMU holds it.
#[tokio::test]
async fn content_is_what_the_guest_sees() {
    let folder = folder();
    let writes = ["write -P 7 1M 64k", "write -P 9 67108864 512", "write -P 3 83885568 512"];
    let mut want = vec![0; 80 << 20];
    want[1 << 20..(1 << 20) + (64 << 10)].fill(7);
    want[64 << 20..(64 << 20) + 512].fill(9);
    want[(80 << 20) - 512..].fill(3);
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let path = folder.path().join(format.as_str());
        make_image(&path, format, &writes);
        let qemu = start(folder.path(), &spec(folder.path(), vec![disk(&path, format)])).await;
        for tool in image_tools(folder.path()) {
            let mut content = read_content(&tool, &path, format, 0..u64::MAX).expect("content");
            let mut bytes = Vec::new();
            content.stdout.take().expect("bytes").read_to_end(&mut bytes).await.expect("bytes");
            assert!(content.wait().await.expect("an end").success());
            assert!(bytes == want, "{format:?} with {}", tool.program.display());
        }
        drop(qemu);
    }
    let path = folder.path().join("broken");
    std::fs::write(&path, [7; 65536]).expect("a file");
    let mut content =
        read_content(&image_tool(), &path, ImageFormat::Qcow2, 0..u64::MAX).expect("content");
    let mut bytes = Vec::new();
    content.stdout.take().expect("bytes").read_to_end(&mut bytes).await.expect("an end");
    assert!(content.wait().await.is_err(), "not a qcow2 image");
}
