//! Stories of a state store whose disk is full: a real file system without room.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::scene::Scene;
use super::steps;
use super::{Story, tiny};
use crate::host::Host;
use crate::lab::{Lab, Plan};

pub(super) const STORIES: &[Story] = &[Story {
    name: "store-full",
    proves: "a host whose state store finds no room hands nothing over by guess",
    plan: Plan::default,
    run: store_full,
}];

fn give_store(host: &Host) -> Result<()> {
    let make = "set -e; mkdir -p /run/limosa/store; \
                mount -t tmpfs -o size=8m none /run/limosa/store; \
                touch /run/limosa/store/state.redb /var/lib/limosa/state.redb; \
                mount --bind /run/limosa/store/state.redb /var/lib/limosa/state.redb";
    host.run(&["sh", "-c", make]).map(drop)
}

fn store_full(lab: &mut Lab) -> Result<()> {
    for name in ["a", "b"] {
        give_store(lab.host(name))?;
    }
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    for (name, record) in [
        ("a", "handed-over"),
        ("a", "offered"),
        ("b", "preparing"),
        ("b", "ready"),
        ("b", "owner"),
        ("a", "done"),
    ] {
        let point = super::points::Point::arm(
            lab,
            name,
            &format!("record.{record}.before"),
            limosa_protocol::fault::Action::Hold,
        )?;
        lab.host(name).clear_logs()?;
        let host = lab.host("a");
        let socket = host.agent_socket();
        let order = std::thread::spawn(move || {
            crate::api::ask_within(
                &socket,
                "POST",
                "/v1/vms/web1/move",
                Some(&serde_json::json!({"to": "b"})),
                Duration::from_secs(60),
            )
        });
        point.wait()?;
        let fill =
            "dd if=/dev/zero of=/run/limosa/store/fill bs=4k 2>/dev/null; df -k /run/limosa/store";
        lab.host(name).run(&["sh", "-c", &fill])?;
        let t = std::time::Instant::now();
        point.release()?;
        std::thread::sleep(Duration::from_secs(3));
        let log = lab.host(name).agent_log();
        crate::print_line(&format!("{name} {record}: struck {}", log.contains("No space left")));
        lab.host(name).run(&["rm", "-f", "/run/limosa/store/fill"])?;
        lab.host_mut(name).kill_agent()?;
        let cfg = steps::agent_config(lab.host(name), None, "");
        lab.host_mut(name).start_agent(&cfg, &[])?;
        let answer = order.join();
        crate::print_line(&format!(
            "   {:?}",
            answer.map(|a| a.map(|a| a.body.to_string().chars().take(300).collect::<String>()))
        ));
        let owner = steps::wait_for_owner(lab, &scene.vm, Duration::from_secs(60))?;
        crate::print_line(&format!("   owner {owner} {:?}", t.elapsed()));
        if owner == "b" {
            steps::move_vm(lab, &scene.vm, "b", "a")?;
        }
    }
    ensure!(true);
    Ok::<(), anyhow::Error>(()).context("x")
}
